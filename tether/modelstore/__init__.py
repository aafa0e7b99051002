"""The model store: inspects pushed files and makes versions of them."""
