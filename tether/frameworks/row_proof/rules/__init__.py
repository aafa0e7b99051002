"""Rules for families of operators: importing a module puts its own on the list of what is allowed."""
