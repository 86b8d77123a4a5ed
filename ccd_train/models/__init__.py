"""Networks: the ViT, its heads, the student and the teacher."""
