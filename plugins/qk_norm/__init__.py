"""Every head of queries and keys is normalized."""
