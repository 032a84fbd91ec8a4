"""What nodes say to each other and to clients: words, bytes, limits, errors. PROTOCOL.md is the law of this room."""
