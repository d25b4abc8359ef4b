"""Programs that people start: the command line, the terminal chat, the batch files and the server."""
