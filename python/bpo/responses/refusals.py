"""Which responses refuse to answer, told by how they begin."""

from __future__ import annotations

import re

_CANNOT = r"(can't|cannot|can not|won't|will not|am unable|'m unable|am not able|'m not able|am not going|must decline)"
_HELP = (
    r"(help|assist|answer|comply|provide|fulfil|fulfill|do that|do this|support|engage|create|generate|discuss|write|"
    r"participate|share|offer)"
)


REFUSAL_PATTERNS: tuple[str, ...] = (
    # English
    rf"(i'?m|i am) ((really|very|so|truly) )?sorry[,.]? (but )?(as an? [^.!?\n]{{0,40}},? )?i ?{_CANNOT}",
    rf"(sorry|apologies|unfortunately)[,.]? (but )?i ?{_CANNOT}",
    rf"i (apologize|apologise|regret),? (but|that) i ?{_CANNOT}",
    rf"i ?{_CANNOT} (to )?{_HELP}",
    rf"as an? (ai|artificial intelligence|language model)\b[^.!?\n]{{0,40}},? i ?{_CANNOT}",
    # German
    r"(es )?tut mir (sehr )?leid,? (aber |doch )?(ich (kann|darf|werde)|dabei|das kann)",
    r"(leider|entschuldigung,?( aber)?) (kann|darf) ich [^.!?\n]{0,60}\b(nicht|keine?n?)\b",
    r"ich (kann|darf|werde) (dir|ihnen|dabei|das|diese[nmrs]?|darauf)\b[^.!?\n]{0,60}\bnicht (weiter)?(helfen|"
    r"beantworten|unterstützen|erfüllen)",
    # French
    r"(je suis )?(vraiment )?(désolée?|navrée?),? (mais )?je ne (peux|suis|vais)",
    r"je ne (peux|suis) pas (en mesure|vous aider|t'aider|répondre|fournir|capable|autorisé)",
    # Spanish
    r"lo (siento|lamento)( mucho)?,? (pero )?no (puedo|estoy|me es)",
    r"no puedo (ayudar|responder|proporcionar|cumplir|asistir|ofrecer)",
    # Portuguese
    r"(sinto muito|desculpe|lamento),? (mas )?(eu )?não (posso|consigo|sou)",
    r"(eu )?não (posso|consigo) (ajudar|responder|fornecer|atender|auxiliar)",
    # Italian
    r"(mi dispiace|spiacente),? (ma )?non (posso|sono)",
    r"non posso (aiutar|risponder|fornir|soddisfar|assister)",
    # Russian
    r"(извините|простите|к сожалению),? (но )?(я )?не (могу|смогу)",
    r"я не могу (помочь|ответить|предоставить|выполнить)",
    # Chinese
    r"(很|非常|十分)?(抱歉|对不起|對不起)[,，。!！ ]{0,2}(但)?(我|作为|作為)?[^。!！\n]{0,12}"
    r"(不能|无法|無法|不会|不會)",
    r"我(不能|无法|無法)(帮|幫|协助|協助|回答|提供|满足|滿足|为您|為您)",
    # Japanese
    r"(大変)?(申し訳(ありません|ございません|ない)|すみません|ごめんなさい)[^\n]{0,60}"
    r"(できません|できかねます|いたしかねます|お答えできない)",
    # Korean
    r"(죄송합니다|죄송하지만|미안하지만)[^\n]{0,60}(수 없습니다|수 없어요|어렵습니다)",
)
"""How refusals begin, in languages that models often refuse in *(ours)*; case and curly apostrophes do not matter."""


_REFUSAL = re.compile("|".join(f"(?:{pattern})" for pattern in REFUSAL_PATTERNS), re.IGNORECASE)
_LEADING = " \t\n\"'“”‘’*_>#-"


def is_refusal(text: str) -> bool:
    """Whether a response begins as a refusal to answer (:data:`REFUSAL_PATTERNS`).

    It is a list of phrases: one that refuses in other words, or later on, is not found.

    Example:
        >>> is_refusal("I’m sorry, but I can't help with that."), is_refusal("I cannot recommend this film enough!")
        (True, False)
        >>> is_refusal("Es tut mir leid, aber ich kann dabei nicht helfen."), is_refusal("抱歉，我无法回答这个问题。")
        (True, True)
    """
    return _REFUSAL.match(text.lstrip(_LEADING).replace("’", "'")) is not None
