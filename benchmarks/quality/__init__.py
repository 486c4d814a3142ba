"""Quality of the labels: scores of pictures and streams against labels that people have drawn."""
