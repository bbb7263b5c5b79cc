"""`python -m cryodrgn_pipeline` is the `cryodrgn-pipeline` command."""

from cryodrgn_pipeline.cli import main

if __name__ == "__main__":
    main()
