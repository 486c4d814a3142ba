"""OpenCV, of any flavour. All modules import it from here: from runtime.opencv import cv2."""

from runtime.flavours import check_version, missing

try:
    import cv2
except (ImportError, AttributeError) as error:  # AttributeError: the files of two flavours mixed
    raise missing("cv2", error) from error

check_version("cv2", cv2)
