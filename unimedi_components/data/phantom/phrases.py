# SPDX-License-Identifier: Apache-2.0
"""The wording of phantom reports: templates per finding, and what is said beside the findings.

Slots of a template: ``{sev}`` severity word, ``{side}``, ``{where}`` (side and zone as a place), ``{size}``,
``{nodule}`` and ``{nodular}`` (a mass above 3 cm), for number ``{a}``, ``{s}``, ``{y}``, ``{is}``, ``{verb}`` (the s
of a verb). A finding on both sides is worded in the plural. X-ray and CT reports share most templates and differ in
places, in style and in what only one of them shows (`OWN`): a film projections, silhouettes and pleural lines, a CT
attenuation, septa and lobes.
"""

from __future__ import annotations

__all__ = [
    "CLEAR",
    "IMPRESSION",
    "INDICATIONS",
    "NEGATIVE",
    "NORMAL",
    "OWN",
    "POSITIVE",
    "SCOLIOSIS",
    "SEVERITY",
    "SHIFT",
    "STYLE",
    "WHERE",
]

_Severity = dict[str, tuple[str, ...]]
_Words = dict[str, _Severity]
_Templates = dict[str, tuple[str, ...]]

_DEGREE: _Severity = {
    "small": ("mild", "slight", "minimal"),
    "moderate": ("moderate", "moderately severe"),
    "large": ("severe", "marked", "pronounced"),
}
SEVERITY: _Words = {
    "nodule": {
        "small": ("small", "discrete small"),
        "moderate": ("medium-sized", "moderate-sized", "well-defined"),
        "large": ("large", "sizeable", "prominent"),
    },
    "consolidation": {
        "small": ("limited", "subtle", "mild patchy"),
        "moderate": ("moderate", "patchy", "segmental"),
        "large": ("extensive", "confluent", "dense"),
    },
    "ground_glass": {
        "small": ("subtle", "faint", "small patchy"),
        "moderate": ("moderate patchy", "multifocal", "moderate"),
        "large": ("extensive", "confluent", "pronounced"),
    },
    "effusion": {
        "small": ("small", "minor", "trace to small", "slight"),
        "moderate": ("moderate", "small to moderate"),
        "large": ("large", "sizeable", "extensive", "massive"),
    },
    "pneumothorax": {
        "small": ("small", "tiny", "minor"),
        "moderate": ("moderate", "small to moderate"),
        "large": ("large", "sizeable", "extensive"),
    },
    "cardiomegaly": _DEGREE,
    "atelectasis": {
        "small": ("mild", "minor", "subsegmental"),
        "moderate": ("moderate", "segmental"),
        "large": ("marked", "severe", "extensive"),
    },
    "edema": _DEGREE,
}

# The left lung has no middle lobe: its middle third is the lingula of the upper lobe.
WHERE: dict[str, _Words] = {
    "xray": {
        "left": {
            "upper": ("the left upper lung", "the left upper lung zone", "the upper zone of the left lung"),
            "middle": ("the left mid lung", "the left mid lung zone", "the mid zone of the left lung"),
            "lower": ("the left lower lung", "the left lower lung zone", "the left lung base"),
        },
        "right": {
            "upper": ("the right upper lung", "the right upper lung zone", "the upper zone of the right lung"),
            "middle": ("the right mid lung", "the right mid lung zone", "the mid zone of the right lung"),
            "lower": ("the right lower lung", "the right lower lung zone", "the right lung base"),
        },
        "bilateral": {
            "upper": ("both upper lung zones", "the upper zones of both lungs", "the upper lungs bilaterally"),
            "middle": ("both mid lung zones", "the mid zones of both lungs", "the mid lungs bilaterally"),
            "lower": ("both lower lung zones", "both lung bases", "the lower lungs bilaterally"),
        },
    },
    "ct": {
        "left": {
            "upper": ("the left upper lobe", "the upper portion of the left lung", "the upper lobe of the left lung"),
            "middle": ("the lingula", "the mid portion of the left lung", "the left mid lung"),
            "lower": ("the left lower lobe", "the lower portion of the left lung", "the left lung base"),
        },
        "right": {
            "upper": (
                "the right upper lobe",
                "the upper portion of the right lung",
                "the upper lobe of the right lung",
            ),
            "middle": ("the right middle lobe", "the mid portion of the right lung", "the right mid lung"),
            "lower": ("the right lower lobe", "the lower portion of the right lung", "the right lung base"),
        },
        "bilateral": {
            "upper": ("both upper lobes", "the upper portions of both lungs", "the upper lobes bilaterally"),
            "middle": (
                "the right middle lobe and lingula",
                "the mid portions of both lungs",
                "the mid lungs bilaterally",
            ),
            "lower": ("both lower lobes", "the lower portions of both lungs", "both lung bases"),
        },
    },
}

POSITIVE: _Templates = {
    "nodule": (
        "There {is} {a}{sev} pulmonary {nodule} in {where} measuring {size}.",
        "{a}{sev} rounded {nodule} {is} seen in {where}, {size} in diameter.",
        "In {where} there {is} {a}{sev} {nodular} opacit{y} of {size}.",
        "{a}{sev} lung {nodule} of {size} {is} present in {where}.",
    ),
    "consolidation": (
        "There is {sev} consolidation in {where}.",
        "{sev} airspace consolidation is present in {where}.",
        "{sev} opacification of {where} with air bronchograms is consistent with consolidation.",
        "In {where} there is {sev} consolidation, concerning for pneumonia.",
        "{a}{sev} area{s} of airspace consolidation involve{verb} {where}.",
    ),
    "ground_glass": (
        "{sev} ground-glass opacities are seen in {where}.",
        "There is {sev} ground-glass opacity in {where}.",
        "In {where} there are {sev} areas of ground-glass opacity.",
        "{sev} hazy ground-glass change involves {where}.",
    ),
    "effusion": (
        "There {is} {a}{sev} {side} pleural effusion{s}.",
        "{sev} {side} pleural effusion{s} {is} present.",
        "{side} pleural effusion{s}, {sev} in amount.",
        "A {sev} amount of {side} pleural fluid is seen.",
    ),
    "pneumothorax": (
        "There is a {sev} {side} pneumothorax.",
        "A {sev} {side} pneumothorax is present.",
        "Air in the {side} pleural space is compatible with a {sev} pneumothorax.",
        "{side} pneumothorax, {sev} in size.",
    ),
    "cardiomegaly": (
        "There is {sev} cardiomegaly.",
        "The heart is enlarged to a {sev} degree.",
        "{sev} cardiomegaly is present.",
    ),
    "atelectasis": (
        "There is {sev} atelectasis in {where} with volume loss.",
        "{sev} atelectasis is present in {where}.",
        "Linear and bandlike opacities in {where} reflect {sev} atelectasis.",
        "{sev} volume loss in {where} is compatible with atelectasis.",
        "In {where} there is {sev} atelectatic change.",
    ),
    "edema": (
        "There is {sev} pulmonary edema.",
        "{sev} interstitial pulmonary edema is present on both sides.",
        "{sev} bilateral perihilar opacities are in keeping with edema.",
    ),
}
OWN: dict[str, _Templates] = {
    "xray": {
        "nodule": ("{a}{sev} {nodule} project{verb} over {where}, {size}.",),
        "ground_glass": ("Hazy, {sev} ground-glass opacity is noted in {where}.",),
        "effusion": ("{sev} {side} pleural effusion{s} obscuring the costophrenic angle{s}.",),
        "pneumothorax": ("{sev} {side} pneumothorax is identified with a visible pleural line.",),
        "cardiomegaly": (
            "{sev} enlargement of the cardiac silhouette is noted, consistent with cardiomegaly.",
            "The cardiac silhouette is enlarged with {sev} cardiomegaly.",
        ),
        "edema": (
            "{sev} perihilar haze and vascular congestion indicate pulmonary edema.",
            "{sev} bilateral interstitial edema with septal lines is present.",
            "Indistinct engorged pulmonary vessels are consistent with {sev} pulmonary edema.",
        ),
    },
    "ct": {
        "nodule": ("{a}{sev} solid {nodule} of {size} {is} identified in {where}.",),
        "ground_glass": ("Hazy, {sev} ground-glass attenuation is noted in {where}.",),
        "effusion": ("{sev} {side} pleural effusion{s} layering dependently.",),
        "pneumothorax": ("{sev} {side} pneumothorax with air collecting anteriorly.",),
        "cardiomegaly": (
            "{sev} enlargement of the cardiac chambers is noted, consistent with cardiomegaly.",
            "The transverse diameter of the heart is increased with {sev} cardiomegaly.",
        ),
        "edema": (
            "{sev} bilateral interlobular septal thickening indicates pulmonary edema.",
            "{sev} interstitial edema with smooth septal thickening is present in both lungs.",
            "Engorged pulmonary vessels and septal thickening are consistent with {sev} pulmonary edema.",
        ),
    },
}

IMPRESSION: _Templates = {
    "nodule": ("{sev} {nodule} of {size} in {where}", "Pulmonary {nodule} in {where}, {size}"),
    "consolidation": ("{sev} consolidation in {where}", "Consolidation in {where}, suspicious for pneumonia"),
    "ground_glass": ("{sev} ground-glass opacity in {where}", "Ground-glass opacities in {where}"),
    "effusion": ("{sev} {side} pleural effusion{s}", "{side} pleural effusion{s}, {sev}"),
    "pneumothorax": ("{sev} {side} pneumothorax", "{side} pneumothorax, {sev}"),
    "cardiomegaly": ("{sev} cardiomegaly", "Cardiomegaly, {sev}"),
    "atelectasis": ("{sev} atelectasis in {where}", "Atelectasis in {where}"),
    "edema": ("{sev} pulmonary edema", "Pulmonary edema, {sev}"),
}

NEGATIVE: _Templates = {
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
