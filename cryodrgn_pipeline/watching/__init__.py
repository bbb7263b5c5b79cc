"""Where the jobs of a workflow stand, read from the files that they leave."""
