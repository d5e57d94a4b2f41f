# SPDX-License-Identifier: Apache-2.0
"""The wording of phantom reports: templates per finding and the normal statements.

Fields: ``{sev}`` severity word, ``{side}``, ``{where}`` (side and zone as a place), ``{size}``. Each template
of a finding names it with one of the words that radiologists use for it; X-ray and CT reports share these
words and differ in places and style.
"""

from __future__ import annotations

__all__ = [
    "CLEAR",
    "IMPRESSION",
    "INDICATIONS",
    "NEGATIVE",
    "NORMAL",
    "POSITIVE",
    "SCOLIOSIS",
    "SEVERITY",
    "STYLE",
    "WHERE",
    "ZONE_WORDS",
]

_Severity = dict[str, tuple[str, ...]]
_Words = dict[str, _Severity]

_AMOUNT: _Severity = {
    "small": ("small", "minor", "trace to small", "slight"),
    "moderate": ("moderate", "moderately sized", "medium-sized"),
    "large": ("large", "sizeable", "extensive", "massive"),
}
_DEGREE: _Severity = {
    "small": ("mild", "slight", "minimal"),
    "moderate": ("moderate", "moderately severe"),
    "large": ("severe", "marked", "pronounced"),
}
_SPREAD: _Severity = {
    "small": ("small focal", "limited", "subtle focal", "small patchy"),
    "moderate": ("moderate", "patchy", "segmental"),
    "large": ("large", "extensive", "confluent", "dense lobar"),
}
_HAZE: _Severity = {
    "small": ("subtle", "faint", "small patchy"),
    "moderate": ("moderate patchy", "multifocal", "moderate"),
    "large": ("extensive", "diffuse patchy", "widespread"),
}
SEVERITY: _Words = {
    "nodule": {
        "small": ("small", "tiny", "subtle"),
        "moderate": ("medium-sized", "moderate", "well-defined"),
        "large": ("large", "dominant", "bulky"),
    },
    "consolidation": _SPREAD,
    "ground_glass": _HAZE,
    "effusion": _AMOUNT,
    "pneumothorax": _AMOUNT,
    "cardiomegaly": _DEGREE,
    "atelectasis": {
        "small": ("mild", "minor", "subsegmental"),
        "moderate": ("moderate", "segmental"),
        "large": ("marked", "severe", "lobar"),
    },
    "edema": _DEGREE,
}

WHERE: _Words = {
    "xray": {
        "left": ("left {zone} lung", "left {zone} lung zone", "{zone} left lung"),
        "right": ("right {zone} lung", "right {zone} lung zone", "{zone} right lung"),
        "bilateral": ("bilateral {zone} lungs", "bilateral {zone} lung zones", "{zone} zones of both lungs"),
    },
    "ct": {
        "left": ("left {zone} lobe", "{zone} portion of the left lung", "left {zone} lung"),
        "right": ("right {zone} lobe", "{zone} portion of the right lung", "right {zone} lung"),
        "bilateral": ("bilateral {zone} lobes", "{zone} portions of both lungs", "bilateral {zone} lungs"),
    },
}
ZONE_WORDS: _Words = {
    "xray": {"upper": ("upper", "apical"), "middle": ("mid", "middle"), "lower": ("lower", "basal")},
    "ct": {"upper": ("upper",), "middle": ("middle", "mid"), "lower": ("lower", "basal")},
}

POSITIVE = {
    "nodule": (
        "There is a {sev} pulmonary nodule in the {where} measuring {size}.",
        "A {sev} rounded nodule is seen in the {where}, approximately {size} in diameter.",
        "{Sev} solid nodule projecting over the {where}, {size}.",
        "In the {where} there is a {sev} nodular opacity of about {size}.",
        "A {size} {sev} lung nodule is present in the {where}.",
    ),
    "consolidation": (
        "There is {sev} consolidation in the {where}.",
        "{Sev} airspace consolidation is present in the {where}.",
        "{Sev} opacification of the {where} with air bronchograms is consistent with consolidation.",
        "In the {where} there is {sev} consolidation, concerning for pneumonia.",
        "{Sev} area of airspace consolidation involves the {where}.",
    ),
    "ground_glass": (
        "{Sev} ground-glass opacities are seen in the {where}.",
        "There is {sev} ground-glass opacity in the {where}.",
        "Hazy, {sev} ground-glass attenuation is noted in the {where}.",
        "In the {where} there are {sev} areas of ground-glass opacity.",
        "{Sev} hazy ground-glass change involves the {where}.",
    ),
    "effusion": (
        "There is a {sev} {side} pleural effusion.",
        "{Sev} {side} pleural effusion is present.",
        "{Side} pleural effusion, {sev} in amount.",
        "A {sev} amount of {side} pleural fluid is seen.",
        "{Sev} {side} pleural effusion with adjacent basilar density.",
    ),
    "pneumothorax": (
        "There is a {sev} {side} pneumothorax.",
        "{Sev} {side} pneumothorax is identified with a visible pleural line.",
        "A {sev} {side} pneumothorax is present.",
        "Air in the {side} pleural space is compatible with a {sev} pneumothorax.",
        "{Side} pneumothorax, {sev} in extent.",
    ),
    "cardiomegaly": (
        "There is {sev} cardiomegaly.",
        "The heart is enlarged, {sev} in degree.",
        "{Sev} enlargement of the cardiac silhouette is noted, consistent with cardiomegaly.",
        "{Sev} cardiomegaly is present.",
        "The cardiac silhouette is enlarged with {sev} cardiomegaly.",
    ),
    "atelectasis": (
        "There is {sev} atelectasis in the {where} with volume loss.",
        "{Sev} atelectasis is present in the {where}.",
        "Linear and bandlike opacities in the {where} reflect {sev} atelectasis.",
        "{Sev} volume loss in the {where} is compatible with atelectasis.",
        "In the {where} there is {sev} atelectatic change.",
    ),
    "edema": (
        "There is {sev} pulmonary edema.",
        "{Sev} perihilar haze and vascular congestion indicate pulmonary edema.",
        "{Sev} bilateral interstitial edema with septal thickening is present.",
        "Indistinct engorged pulmonary vessels are consistent with {sev} pulmonary edema.",
        "{Sev} bilateral perihilar opacities are in keeping with edema.",
    ),
}

IMPRESSION = {
    "nodule": ("{Sev} {size} nodule in the {where}", "Pulmonary nodule in the {where}, {size}"),
    "consolidation": (
        "{Sev} consolidation in the {where}",
        "Consolidation in the {where}, suspicious for pneumonia",
    ),
    "ground_glass": ("{Sev} ground-glass opacity in the {where}", "Ground-glass opacities in the {where}"),
    "effusion": ("{Sev} {side} pleural effusion", "{Side} pleural effusion, {sev}"),
    "pneumothorax": ("{Sev} {side} pneumothorax", "{Side} pneumothorax, {sev}"),
    "cardiomegaly": ("{Sev} cardiomegaly", "Cardiomegaly, {sev}"),
    "atelectasis": ("{Sev} atelectasis in the {where}", "Atelectasis in the {where}"),
    "edema": ("{Sev} pulmonary edema", "Pulmonary edema, {sev}"),
}

NEGATIVE = {
    "nodule": ("pulmonary nodule", "suspicious nodule", "lung nodule"),
    "consolidation": ("focal consolidation", "consolidation", "airspace consolidation"),
    "ground_glass": ("ground-glass opacity", "ground-glass change"),
    "effusion": ("pleural effusion", "effusion"),
    "pneumothorax": ("pneumothorax",),
    "atelectasis": ("atelectasis",),
    "edema": ("pulmonary edema", "edema"),
}
STYLE = {
    "xray": ("No {list}.", "There is no {list}.", "No evidence of {list}.", "No {list} is seen."),
    "ct": (
        "No {list}.",
        "There is no evidence of {list}.",
        "No {list} is identified.",
        "Negative for {list}.",
    ),
}

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
NORMAL: _Words = {
    "xray": {
        "heart": (
            "The heart is normal in size.",
            "Cardiac silhouette is within normal limits.",
            "Heart size is normal.",
            "Cardiac size is unremarkable.",
        ),
        "mediastinum": (
            "Mediastinal contours are unremarkable.",
            "The mediastinum is within normal limits.",
            "Normal mediastinal silhouette.",
            "The aortic contour is stable.",
        ),
        "bones": (
            "No acute osseous abnormality.",
            "The visualized bony structures are intact.",
            "Imaged ribs and clavicles show no fracture.",
            "Degenerative changes of the thoracic spine are mild.",
        ),
        "other": (
            "Upper abdomen is unremarkable.",
            "No free air below the diaphragm.",
            "Soft tissues are unremarkable.",
            "The trachea is patent.",
        ),
        "impression": (
            "No acute cardiopulmonary process.",
            "No acute cardiopulmonary abnormality.",
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
            "The heart is of normal caliber.",
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
            "Bone structures are natural.",
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
            "Thoracic CT examination within normal limits.",
            "Normal chest CT.",
            "No significant pathology in the chest.",
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
