"""The shipped studies: questions of the paper, asked of the lesson."""
