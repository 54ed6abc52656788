"""English to Spanish, word by word: a translator that fits on a page.

It knows the commonest words of questions and of talk about people and books, no grammar and no
names: what it does not know stays as it is. A small model that has only ever seen English takes the
Spanish for noise; ``spanglish`` asks it in a mixture.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# an entry is english:spanish; groups are for whoever adds words
PREPOSITIONS = """
    of:de in:en on:sobre to:a for:para by:por from:desde with:con without:sin about:acerca at:en
    into:dentro within:dentro between:entre among:entre through:mediante during:durante before:antes
    after:después since:desde until:hasta over:sobre under:bajo against:contra towards:hacia
    around:alrededor outside:fuera inside:dentro besides:además apart:aparte up:arriba out:fuera
    along:largo behind:detrás beyond:allende throughout:durante
"""
OTHERS = """
    what:qué who:quién whom:quién whose:cuyo which:cuál when:cuándo where:dónde why:porqué
    how:cómo whether:si if:si

    the:el a:un an:un this:este that:que these:estos those:esos any:algún some:algunos all:todos
    each:cada every:cada both:ambos either:cualquiera another:otro other:otro others:otros
    many:muchos much:mucho more:más most:más few:pocos several:varios such:tal same:mismo
    own:propio one:uno two:dos three:tres four:cuatro five:cinco first:primero second:segundo
    third:tercero last:último

    i:yo me:me my:mi you:tú your:tu he:él him:él his:su she:ella her:su it:ello its:su we:nosotros
    us:nos our:nuestro they:ellos them:ellos their:su there:allí here:aquí himself:mismo
    herself:misma themselves:mismos

    and:y or:o but:pero as:como like:como than:que so:así because:porque while:mientras
    also:también not:no no:no yes:sí ever:jamás never:nunca often:menudo always:siempre
    usually:normalmente typically:típicamente primarily:principalmente
    predominantly:predominantemente mainly:principalmente currently:actualmente
    recently:recientemente originally:originalmente specifically:específicamente
    especially:especialmente particularly:particularmente frequently:frecuentemente only:solamente
    even:incluso still:todavía already:ya just:justo very:muy well:bien too:demasiado now:ahora

    is:es are:son was:fue were:fueron be:ser been:sido being:siendo am:soy has:ha have:han
    had:había having:teniendo do:hacen does:hace did:hizo done:hecho can:puede could:podría
    will:va would:iría shall:debe should:debería may:puede might:podría must:debe

    tell:dime give:da provide:proporciona describe:describe mention:menciona name:nombre
    list:lista share:comparte explain:explica identify:identifica identifies:identifica
    discuss:discute say:decir know:saber known:conocido see:ver seen:visto make:hacer makes:hace
    made:hecho take:tomar taken:tomado get:obtener come:venir comes:viene go:ir find:encontrar
    found:encontrado think:pensar use:usar used:usado uses:usa using:usando keep:guardar
    keeps:guarda begin:empezar began:empezó start:empezar started:empezó become:volverse
    became:volvió live:vivir lives:vive lived:vivió born:nacido died:murió work:obra works:obras
    worked:trabajó working:trabajando write:escribir writes:escribe writing:escritura
    writings:escritos written:escrito wrote:escribió read:leer reading:lectura publish:publicar
    published:publicado authored:firmado penned:redactado translated:traducido adapted:adaptado
    win:ganar won:ganado winning:ganar receive:recibir received:recibido awarded:premiado
    honored:honrado recognized:reconocido acclaimed:aclamado renowned:renombrado
    celebrated:celebrado influence:influencia influences:influencias influenced:influido
    inspire:inspirar inspired:inspirado inspires:inspira inspiration:inspiración impact:impacto
    impacted:impactado affect:afectar affected:afectado shape:formar shaped:formado
    contribute:contribuir contributed:contribuido contribution:contribución
    contributions:contribuciones reflect:reflejar reflected:reflejado reflects:refleja
    incorporate:incorporar incorporates:incorpora incorporated:incorporado explore:explorar
    explores:explora explored:explorado evolve:evolucionar evolved:evolucionado
    collaborate:colaborar collaborated:colaborado engage:participar engaged:participado
    specialize:especializar specializes:especializa focus:enfoque focuses:enfoca draw:extraer
    draws:extrae portray:retratar portrays:retrata portrayed:retratado address:tratar
    addresses:trata approach:enfoque approaches:enfoques handle:manejar create:crear creates:crea
    created:creado creating:crear develop:desarrollar developed:desarrollado choose:elegir
    chose:eligió chosen:elegido decide:decidir decided:decidió help:ayudar helped:ayudó play:jugar
    played:jugado plays:juega learn:aprender learned:aprendido study:estudiar studied:estudiado
    include:incluir includes:incluye including:incluyendo feature:presentar features:presenta
    featured:presentado consider:considerar considered:considerado relate:relacionar
    related:relacionado associated:asociado connected:conectado belong:pertenecer
    represent:representar represented:representado representation:representación show:mostrar
    set:situado stand:destacar stands:destaca distinguish:distinguir differ:diferir
    respond:responder perceive:percibir perceived:percibido

    author:autor author's:autor authors:autores writer:escritor writers:escritores poet:poeta
    novelist:novelista journalist:periodista editor:editor reader:lector readers:lectores
    critic:crítico critics:críticos book:libro books:libros novel:novela novels:novelas
    story:historia stories:historias title:título titles:títulos titled:titulado series:serie
    poem:poema poems:poemas poetry:poesía literature:literatura literary:literario genre:género
    genres:géneros style:estilo styles:estilos theme:tema themes:temas plot:trama plots:tramas
    setting:escenario settings:escenarios character:personaje characters:personajes
    narrative:narrativa narratives:narrativas storytelling:narración fiction:ficción
    nonfiction:ensayo non-fiction:ensayo romance:romance mystery:misterio crime:crimen
    thriller:suspense horror:terror fantasy:fantasía biography:biografía memoir:memorias
    history:historia historical:histórico mythology:mitología folklore:folclore science:ciencia
    erotic:erótico erotica:erótica satire:sátira humor:humor drama:drama comedy:comedia
    symbolism:simbolismo imagery:imágenes language:idioma languages:idiomas word:palabra
    words:palabras voice:voz message:mensaje messages:mensajes film:película films:películas
    movie:película movies:películas screen:pantalla stage:escenario television:televisión

    award:premio awards:premios prize:premio prizes:premios accolade:galardón accolades:galardones
    recognition:reconocimiento honor:honor achievement:logro achievements:logros fame:fama
    success:éxito career:carrera profession:profesión professions:profesiones occupation:ocupación
    occupations:ocupaciones job:trabajo field:campo fields:campos project:proyecto
    projects:proyectos debut:debut journey:camino process:proceso routine:rutina technique:técnica
    techniques:técnicas reception:recepción review:reseña reviews:reseñas audience:público
    popularity:popularidad

    person:persona people:gente man:hombre men:hombres woman:mujer women:mujeres child:niño
    children:niños boy:chico girl:chica friend:amigo friends:amigos family:familia
    families:familias parent:padre parents:padres father:padre mother:madre son:hijo daughter:hija
    brother:hermano sister:hermana wife:esposa husband:esposo doctor:médico nurse:enfermera
    teacher:profesor lawyer:abogado engineer:ingeniero artist:artista musician:músico
    scientist:científico chef:cocinero baker:panadero soldier:soldado student:estudiante
    mentor:mentor

    full:completo birth:nacimiento birthplace:lugar date:fecha day:día month:mes year:año
    years:años age:edad time:tiempo times:tiempos century:siglo today:hoy life:vida lives:vidas
    death:muerte childhood:infancia youth:juventud upbringing:crianza education:educación
    school:escuela university:universidad degree:título background:origen identity:identidad
    gender:sexo orientation:orientación heritage:herencia roots:raíces culture:cultura
    cultures:culturas cultural:cultural tradition:tradición traditions:tradiciones
    religion:religión faith:fe community:comunidad society:sociedad country:país countries:países
    city:ciudad town:pueblo place:lugar home:hogar house:casa street:calle world:mundo
    region:región nation:nación nationality:nacionalidad hometown:pueblo war:guerra peace:paz
    love:amor health:salud mental:mental nature:naturaleza animal:animal animals:animales
    food:comida music:música art:arte arts:artes law:derecho politics:política political:político
    social:social economic:económico psychology:psicología philosophy:filosofía medicine:medicina
    leadership:liderazgo business:negocios money:dinero geology:geología technology:tecnología

    way:manera ways:maneras kind:tipo kinds:tipos type:tipo types:tipos part:parte parts:partes
    role:papel aspect:aspecto aspects:aspectos element:elemento elements:elementos detail:detalle
    details:detalles example:ejemplo examples:ejemplos information:información fact:hecho
    facts:hechos idea:idea ideas:ideas reason:razón reasons:razones source:fuente sources:fuentes
    experience:experiencia experiences:experiencias challenge:reto challenges:retos event:evento
    events:eventos issue:asunto issues:asuntos topic:tema topics:temas subject:materia
    interest:interés interests:intereses opinion:opinión view:vista views:vistas
    perspective:perspectiva perspectives:perspectivas connection:conexión relationship:relación
    relationships:relaciones difference:diferencia future:futuro plans:planes question:pregunta
    answer:respuesta

    new:nuevo old:viejo young:joven early:temprano late:tardío latest:último recent:reciente
    upcoming:próximo next:siguiente good:bueno best:mejor better:mejor great:grande big:grande
    large:grande small:pequeño long:largo short:corto high:alto low:bajo main:principal
    major:mayor primary:primario common:común unique:único special:especial different:diferente
    similar:semejante important:importante significant:significativo notable:notable famous:famoso
    popular:popular prestigious:prestigioso international:internacional national:nacional
    local:local global:global personal:personal public:público private:privado critical:crítico
    creative:creativo original:original contemporary:contemporáneo modern:moderno
    traditional:tradicional classic:clásico diverse:diverso distinct:distinto
    distinctive:distintivo particular:particular specific:específico certain:cierto various:varios
    general:general real:real true:verdadero fictional:ficticio fictitious:ficticio brief:breve
    strong:fuerte recurring:recurrente overall:general professional:profesional successful:exitoso
"""
WORDS = dict(pair.split(":") for pair in (PREPOSITIONS + OTHERS).split())
SMALL = dict(pair.split(":") for pair in PREPOSITIONS.split())

_WORD = re.compile(r"[A-Za-z]+(?:-[A-Za-z]+)*(?P<owner>['\u2019]s?\b)?")


def spanish(texts: Sequence[str]) -> list[str]:
    """Every known word in Spanish, unknown ones as they are; a text may come out unchanged.

    A capital letter stays one, and an owner's apostrophe goes.

    >>> spanish(["What is the profession of Ada Lin's father?"])
    ['Qué es el profesión de Ada Lin padre?']
    """

    def translated(match: re.Match[str]) -> str:
        word = match[0].removesuffix(match["owner"] or "")
        found = WORDS.get(word.lower())
        if found is None:
            return word
        return found.capitalize() if word[0].isupper() else found

    return [_WORD.sub(translated, text) for text in texts]


def spanglish(texts: Sequence[str]) -> list[str]:
    """Prepositions in Spanish, everything else as it is: for models without any Spanish.

    >>> spanglish(["What is the profession of Ada Lin's father?"])
    ["What is the profession de Ada Lin's father?"]
    """
    return [_WORD.sub(lambda m: SMALL.get(m[0], m[0]), text) for text in texts]
