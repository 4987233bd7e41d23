"""Questions put to judges that are asked."""
