"""From RELION's and cryoSPARC's tables, and the images they name, to the canonical particle set."""
