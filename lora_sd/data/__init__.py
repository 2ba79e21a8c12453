"""A folder of images with captions -> cached latents and text embeddings."""
