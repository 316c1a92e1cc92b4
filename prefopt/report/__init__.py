"""What people look at: a run folder as a page (`page`) and in the terminal (`terminal`)."""
