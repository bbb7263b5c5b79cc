"""Host programs: how they start us, what they want to be told, what they take back."""
