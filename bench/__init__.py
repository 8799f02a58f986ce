"""`dmoe bench`: how fast the ops are, against their roofline and against what one would use instead (NOTES.md)."""
