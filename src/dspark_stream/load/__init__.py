"""Who is drafted for, how many tokens, and how many of them are verified, at the load of the moment."""
