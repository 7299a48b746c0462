"""CvT, which timm does not have."""
