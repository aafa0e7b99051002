"""The values that every service speaks of: jobs, tensors, models, tenants. Pure."""
