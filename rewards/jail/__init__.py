"""What runs beside and inside the sandbox, in interpreters of their own: nothing here imports another package."""
