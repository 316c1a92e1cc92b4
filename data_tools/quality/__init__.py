"""Look at a data set before training on it: `check` finds what is wrong, `fix` mends it, `describe` and `view` show it."""
