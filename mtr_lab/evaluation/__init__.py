"""What the programs that evaluate share: operating points, passes over the images, where models run, pictures."""
