"""Durable jobs as the dispatcher looks after them: none is forgotten, ended ones are deleted."""
