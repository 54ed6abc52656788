"""Attack interface lives one level up; this folder holds one membership attack per file."""
