"""What a host's own export has written, against the model that it was written from."""
