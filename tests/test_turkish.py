"""lora/turkish.py: stems that change, and words that only begin alike."""

import pytest

from lora.levels import DATA, read_words
from lora.turkish import uses


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("kitap", "Kitabı masada unuttum."),
        ("el", "Ellerini yıkadın mı?"),
        ("ağız", "Ağzını aç!"),
        ("şehir", "Bu şehri seviyorum."),
        ("renk", "En sevdiğim rengi söyle."),
        ("çocuk", "Çocuğu gördüm."),
        ("su", "Suyun tadı güzel."),
        ("ben", "Bana bak."),
        ("ev", "Evdekiler uyuyor."),
        ("anne", "Annemle konuştum."),
        ("kış", "KIŞIN kar yağar."),
        ("ip", "İpler koptu."),
        ("güzel", "Çok güzelsin."),
        ("yok", "Ekmek yokmuş."),
        ("gitmek", "Okula gidiyorum."),
        ("etmek", "Yardım ediyorum."),
        ("başlamak", "Ders şimdi başlıyor."),
        ("demek", "Ne diyorsun?"),
        ("yemek", "Elma yiyecek misin?"),
        ("yemek", "Yemekler çok güzeldi."),
        ("gelmek", "Bize gelebilir misin?"),
        ("okumak", "Kitap okumuyorum."),
        ("içmek", "Çay içmez misin?"),
        ("görmek", "Seni gördüğüme sevindim."),
        ("İstanbul", "İstanbul'da yaşıyorum."),
        ("Pazartesi", "Pazartesi günü geldi."),
        ("teşekkür etmek", "Size teşekkür ediyorum."),
    ],
)
def test_uses(word, sentence):
    assert uses(word, sentence)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("el", "Elmayı yedim."),
        ("almak", "Altı elma var."),
        ("at", "Atatürk Caddesi nerede?"),
        ("ev", "Evlendim."),
        ("kar", "Kardeşim geldi."),
        ("bakmak", "Bakkal nerede?"),
        ("kitap", "Defteri masada unuttum."),
    ],
)
def test_other_words(word, sentence):
    assert not uses(word, sentence)


def test_the_data():
    """200 words at least, two sentences each, and every sentence uses its word."""
    words = read_words(DATA / "tr-a1.tsv")
    assert len(words) >= 200
    assert {len(sentences) for sentences in words.values()} == {2}
    assert [(word, s) for word, sentences in words.items() for s in sentences if not uses(word, s)] == []
    sentences = [s for some in words.values() for s in some]
    assert len(set(sentences)) == len(sentences)
