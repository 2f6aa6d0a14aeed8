"""A client of the service: the connection, and the terminal chat made with it."""
