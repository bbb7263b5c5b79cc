"""What a run of the workflow will need: memory, time, disk and GPUs of every job, before it starts."""
