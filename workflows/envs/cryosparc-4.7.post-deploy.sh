pip install --no-deps cryodrgn-pipeline==0.1.0
