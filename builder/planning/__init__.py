"""What a deployment will need and do, said before anything is built."""
