"""JetStream key-value buckets: read, written with compare-and-set, watched, verified."""
