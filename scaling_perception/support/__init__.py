"""What every room uses: user errors, careful file writing, configs. Imports nothing of the package."""
