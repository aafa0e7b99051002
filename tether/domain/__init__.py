"""Values shared by all services: jobs, tensors, models, tenants. Pure."""
