"""Host programs' protocols; nothing here is imported unless it is asked for."""
