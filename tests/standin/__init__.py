"""A cryoSPARC that the real client can talk to, for tests on one machine; see README.md."""
