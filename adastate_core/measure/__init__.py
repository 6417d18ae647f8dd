"""What is measured of videos and of attention."""
