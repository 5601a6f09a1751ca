"""What commands that use runs need before their work."""
