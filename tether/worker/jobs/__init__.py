"""Pull bundles from lanes, verify them, run their jobs and publish the outcomes."""
