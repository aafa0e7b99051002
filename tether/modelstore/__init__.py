"""Keeper of models: takes pushed files, looks at them, and makes them versions."""
