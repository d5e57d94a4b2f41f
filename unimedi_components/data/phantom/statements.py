# SPDX-License-Identifier: Apache-2.0
"""What phantom reports say beside the findings: normal statements, spine, mediastinum, follow-up, indications."""

from __future__ import annotations

__all__ = ["CLEAR", "INDICATIONS", "NORMAL", "SCOLIOSIS", "SHIFT"]

CLEAR = {
    "xray": (
        "The lungs are clear.",
        "Lungs are well expanded and clear.",
        "Both lungs are clear and well aerated.",
    ),
    "ct": (
        "The lung parenchyma is clear.",
        "Normal aeration of both lungs.",
        "The lungs are clear on lung window images.",
    ),
}
NORMAL: dict[str, dict[str, tuple[str, ...]]] = {
    "xray": {
        "heart": (
            "The heart is normal in size.",
            "The size of the cardiac silhouette is normal.",
            "Heart size is normal.",
            "Cardiac size is unremarkable.",
        ),
        "mediastinum": (
            "Mediastinal contours are unremarkable.",
            "The mediastinum is within normal limits.",
            "Normal mediastinal silhouette.",
            "The aortic contour is normal.",
        ),
        "bones": (
            "No acute osseous abnormality.",
            "The visualized bony structures are intact.",
            "Imaged ribs and clavicles show no fracture.",
            "Vertebral body heights are maintained.",
        ),
        "other": (
            "Upper abdomen is unremarkable.",
            "No free air below the diaphragm.",
            "Soft tissues are unremarkable.",
            "No radiopaque foreign body.",
        ),
        "impression": (
            "No acute cardiopulmonary process.",
            "No acute cardiopulmonary abnormality.",
        ),
        "unremarkable": (
            "Normal chest radiograph.",
            "Unremarkable chest film without acute disease.",
        ),
        "follow": (
            "Clinical correlation is recommended.",
            "Follow-up radiograph is advised.",
            "Comparison with prior films would be helpful.",
            "Findings were discussed with the referring team.",
        ),
    },
    "ct": {
        "heart": (
            "Heart size is normal on axial images.",
            "The cardiac chambers are not dilated.",
            "Heart contour and size are normal.",
            "The heart is of normal size.",
        ),
        "mediastinum": (
            "Mediastinal main vascular structures are normal.",
            "No enlarged mediastinal or hilar lymph nodes are detected.",
            "Trachea and both main bronchi are patent.",
            "Thoracic aorta diameter is normal.",
        ),
        "bones": (
            "No lytic or destructive bone lesion in the study area.",
            "Vertebral body heights are preserved.",
            "No fracture line is detected.",
            "Osseous structures within the scan range are intact.",
        ),
        "other": (
            "Upper abdominal sections are unremarkable.",
            "The visualized liver and spleen are normal.",
            "Adrenal glands are not thickened.",
            "Chest wall soft tissues appear normal.",
        ),
        "impression": (
            "No acute intrathoracic abnormality.",
            "No significant pathology in the chest.",
        ),
        "unremarkable": (
            "Thoracic CT examination within normal limits.",
            "Normal chest CT.",
        ),
        "follow": (
            "Correlation with clinical and laboratory data is recommended.",
            "Follow-up CT is advised.",
            "Comparison with previous examinations is suggested.",
            "Close surveillance is appropriate.",
        ),
    },
}
SCOLIOSIS = (
    "There is scoliosis of the thoracic spine.",
    "Scoliotic curvature of the spine is noted.",
    "The thoracic spine shows lateral curvature.",
)
SHIFT = (
    "The mediastinum is shifted to the {side}.",
    "There is mediastinal shift to the {side}.",
    "Mediastinal structures are displaced to the {side}.",
)
INDICATIONS = (
    "with cough and fever",
    "with shortness of breath",
    "with chest pain",
    "with hypoxia",
    "for preoperative evaluation",
    "with weakness, rule out infection",
    "with known heart disease",
    "after a fall",
)
