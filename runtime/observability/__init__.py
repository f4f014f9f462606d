"""What is measured of each step and request: metrics, a log line, spans."""
