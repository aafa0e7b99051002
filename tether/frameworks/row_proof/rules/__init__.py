"""Rules for families of operators: importing a module registers its rules."""
