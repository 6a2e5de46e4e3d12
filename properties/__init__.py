"""What must be true: exact definitions, the arithmetics that evaluate them, budgets, inputs, claims."""
