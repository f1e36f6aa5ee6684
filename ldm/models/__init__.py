"""The networks: UNet, autoencoder, text encoders, and where their weights come from."""
