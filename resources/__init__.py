"""What the credit pipeline reaches out to: where its applications come from, and the bank it acts on."""
