"""What makes other libraries' models use the operators: one file per library, each imported by whoever has it."""
