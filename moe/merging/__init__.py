"""Several LoRAs as one, after training. One way a file; ``kinds.py`` names them."""
