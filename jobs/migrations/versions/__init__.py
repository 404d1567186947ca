"""One file per schema revision, oldest first; a file that was released is never edited."""
