package auth

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/MicahParks/jwkset"
	"github.com/golang-jwt/jwt/v5"
	"github.com/google/uuid"
)

const (
	// leeway is what a token may be past its exp or before its nbf, because clocks differ. iat is
	// not judged: RFC 7519, 4.1.6 gives it no such meaning, nbf has it.
	leeway = 5 * time.Second

	maxTokenBytes   = 8 << 10
	maxCachedTokens = 10_000

	// refreshEvery bounds how long a key that an issuer has withdrawn is still believed, as long as
	// the issuer answers.
	refreshEvery = 5 * time.Minute
	// fetchGap is the least time between two fetches of one issuer's keys, whoever asks.
	fetchGap = 30 * time.Second
	// fetchTime bounds one fetch, discovery included.
	fetchTime        = 5 * time.Second
	maxResponseBytes = 1 << 20
	maxRedirects     = 3
	// maxWaiters is how many callers with an unknown key may wait for one issuer's running fetch;
	// the rest are refused at once, so that a slow issuer cannot fill the server with them.
	maxWaiters = 64

	// minRSABits is the least that RFC 7518, 3.3 allows for RS256.
	minRSABits = 2048
)

// ErrToken is wrapped by every refusal of [Issuers.Verify]. The message of the refusal says why, in
// words fit for the token's bearer, and never holds the token.
var ErrToken = errors.New("token refused")

// refusal says why a token is refused. It wraps ErrToken.
type refusal string

func (r refusal) Error() string { return ErrToken.Error() + ": " + string(r) }
func (r refusal) Unwrap() error { return ErrToken }

const (
	errTooLong   refusal = "it is longer than 8 KiB"
	errMalformed refusal = "it is not a well-formed JWT"
	errCritical  refusal = "it has a crit header, and no extension is understood here"
	errIssuer    refusal = "its issuer (iss) is not trusted here"
	errKey       refusal = "its issuer is not known to have such a key (kid): if the key is new, try again in 30 s"
	errSubject   refusal = "its sub is not a lower-case UUID, and without org_id it must name a user by one"
	errService   refusal = "it has an org_id, but no sub that names the service"
	errOrg       refusal = "its issuer may not sign for the organisation in org_id"
)

// refusals translates what the JWT library finds. The first that fits is told.
var refusals = []struct {
	cause error
	why   refusal
}{
	{jwt.ErrTokenSignatureInvalid, "its signature is not valid, or its alg is none of RS256, ES256 and EdDSA"},
	{jwt.ErrTokenUnverifiable, "its alg is none of RS256, ES256 and EdDSA"},
	{jwt.ErrTokenExpired, "it has expired (exp): get a new one"},
	{jwt.ErrTokenNotValidYet, "it is not valid yet (nbf)"},
	{jwt.ErrTokenInvalidAudience, "it is meant for another audience (aud)"},
	{jwt.ErrTokenRequiredClaimMissing, "it lacks exp or aud"},
}

// explain turns any error of a verification into a refusal, so that nothing of the token that a
// library may quote gets further.
func explain(err error) error {
	if own, ok := errors.AsType[refusal](err); ok {
		return own
	}
	for _, r := range refusals {
		if errors.Is(err, r.cause) {
			return r.why
		}
	}
	return errMalformed
}

// Claims is what a verified token says.
type Claims struct {
	Issuer  string // iss, for example "https://idp.example"
	Subject string // sub: a user's UUID, or a service's client id when Org is set
	ID      string // jti, "" when the token has none

	// Org is the organisation that a B2B service acts for (org_id), "" for a B2C user.
	Org string
	// Scopes is what a service may do (scope: RFC 8693, 4.2); nil for a user. It is shared with
	// other callers: don't change it.
	Scopes []string

	Expires time.Time // exp
}

// IssuerConfig trusts one external issuer.
type IssuerConfig struct {
	URL      string // exactly the iss of its tokens, for example "https://idp.example"
	JWKS     string // where its keys are; "" to ask URL/.well-known/openid-configuration
	Audience string // required: what the aud of its tokens must hold

	// Orgs are the organisations for which this issuer may sign service tokens: none by default, so
	// that an issuer of users cannot speak for an organisation.
	Orgs []string
}

// ParseIssuer reads "url=https://idp.example,audience=openlock,jwks=https://…,org=acme,org=beta",
// where jwks and org may be left out. Its errors say what to write instead.
func ParseIssuer(s string) (IssuerConfig, error) {
	var c IssuerConfig
	for field := range strings.SplitSeq(s, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(field), "=")
		if err := c.set(name, value); err != nil {
			return IssuerConfig{}, fmt.Errorf("issuer %q: %w", s, err)
		}
	}
	if err := c.check(); err != nil {
		return IssuerConfig{}, fmt.Errorf("issuer %q: %w", s, err)
	}
	return c, nil
}

func (c *IssuerConfig) set(name, value string) error {
	once := map[string]*string{"url": &c.URL, "audience": &c.Audience, "jwks": &c.JWKS}
	to, known := once[name]
	switch {
	case !known && name != "org":
		return fmt.Errorf("unknown field %q: the fields are url, audience, jwks and org", name)
	case value == "":
		return fmt.Errorf("%s has no value: write %s=…", name, name)
	case name == "org":
		c.Orgs = append(c.Orgs, value)
	case *to != "":
		return fmt.Errorf("%s is given twice: leave one (only org may be repeated)", name)
	default:
		*to = value
	}
	return nil
}

func (c IssuerConfig) check() error {
	if c.URL == "" {
		return errors.New("no url: add url=https://…, exactly as in the iss of its tokens")
	}
	if err := checkURL(c.URL); err != nil {
		return fmt.Errorf("url: %w", err)
	}
	if c.Audience == "" {
		return errors.New("no audience: add audience=…, the aud of the tokens meant for openlock")
	}
	if c.JWKS == "" {
		return nil
	}
	if err := checkURL(c.JWKS); err != nil {
		return fmt.Errorf("jwks: %w", err)
	}
	return nil
}

// checkURL refuses addresses whose answer somebody on the way could forge.
func checkURL(raw string) error {
	u, err := url.Parse(raw)
	switch {
	case err != nil:
		return err
	case u.User != nil:
		return errors.New("remove the user name and password from the address")
	case u.Host != "" && (u.Scheme == "https" || u.Scheme == "http" && loopback(u.Hostname())):
		return nil
	}
	return fmt.Errorf("%q: use an https:// address (http:// only for this machine: localhost, 127.0.0.1, [::1])", raw)
}

func loopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && addr.IsLoopback()
}

// checkHop refuses to be sent from one address on to another that is less safe.
func checkHop(from, to string) error {
	if strings.HasPrefix(from, "https:") && !strings.HasPrefix(to, "https:") {
		return fmt.Errorf("%q points to %q, which is not https", from, to)
	}
	return checkURL(to)
}

// Issuers verifies tokens against the keys of the issuers that are trusted. It is safe for
// concurrent use.
type Issuers struct {
	trusted map[string]*issuer // by iss; never changes
	parser  *jwt.Parser
	cache   tokenCache
	client  *http.Client
	log     *slog.Logger

	life context.Context // ends with Close
	stop context.CancelFunc
	work sync.WaitGroup
	mu   sync.Mutex // guards the fetches of all issuers, and Close against new ones
}

// issuer is one whose tokens are believed. Each has its own keys: a kid means nothing across issuers.
type issuer struct {
	config    IssuerConfig
	builtIn   bool // may sign for any organisation; its keys are known and never fetched
	validator *jwt.Validator
	keys      atomic.Pointer[keySet] // never nil
	waiters   chan struct{}

	started time.Time     // of the last fetch
	running chan struct{} // closes when the running fetch ends; nil when none runs
	failed  bool          // the last fetch
}

// NewIssuers trusts the built-in issuer (unless nil) and the external ones. It neither fails nor
// blocks: keys are fetched in the background by a copy of client, and an issuer that cannot be
// reached is tried again every 30 s. An external issuer with an unusable configuration, or with the
// URL of an earlier one, is logged and not trusted.
func NewIssuers(builtin *BuiltIn, external []IssuerConfig, client *http.Client, log *slog.Logger) *Issuers {
	guarded := *client
	guarded.CheckRedirect = checkRedirect
	i := &Issuers{
		trusted: make(map[string]*issuer),
		parser: jwt.NewParser(
			jwt.WithValidMethods([]string{"RS256", "ES256", "EdDSA"}),
			jwt.WithStrictDecoding(),
			jwt.WithoutClaimsValidation(), // each issuer has its own audience: see issuer.validator
		),
		cache:  tokenCache{tokens: make(map[[sha256.Size]byte]verifiedToken)},
		client: &guarded,
		log:    log,
	}
	i.life, i.stop = context.WithCancel(context.Background())
	if builtin != nil {
		i.trusted[builtin.url] = newIssuer(IssuerConfig{URL: builtin.url, Audience: Audience}, builtin.keys)
		i.trusted[builtin.url].builtIn = true
	}
	for _, c := range external {
		i.trust(c)
	}
	return i
}

func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) > maxRedirects {
		return errors.New("too many redirects")
	}
	return checkHop(via[len(via)-1].URL.String(), req.URL.String())
}

func newIssuer(c IssuerConfig, keys *keySet) *issuer {
	s := &issuer{
		config: c,
		validator: jwt.NewValidator(
			jwt.WithIssuer(c.URL), jwt.WithAudience(c.Audience),
			jwt.WithExpirationRequired(), jwt.WithLeeway(leeway),
		),
		waiters: make(chan struct{}, maxWaiters),
	}
	s.keys.Store(keys)
	return s
}

func (i *Issuers) trust(c IssuerConfig) {
	err := c.check()
	if err == nil && i.trusted[c.URL] != nil {
		err = errors.New("there is an issuer with this URL already")
	}
	if err != nil {
		i.log.Error("issuer is not trusted", "issuer", c.URL, "error", err)
		return
	}
	s := newIssuer(c, &keySet{})
	i.trusted[c.URL] = s
	i.work.Go(func() { i.keepFresh(s) })
}

// Close ends the fetching and waits for it. Verify still works, with the keys known by then.
func (i *Issuers) Close() {
	i.mu.Lock()
	i.stop()
	i.mu.Unlock()
	i.work.Wait()
}

// Verify says what a token in compact form claims, once its signature, iss, aud, exp and nbf are
// found good (RFC 7519, 7.2; RFC 8725). Every error wraps [ErrToken]. It waits only when the token
// names a key that is not known while the issuer's keys are being fetched: then for that fetch, at
// most 5 s, or for ctx.
func (i *Issuers) Verify(ctx context.Context, raw string) (Claims, error) {
	if len(raw) > maxTokenBytes {
		return Claims{}, errTooLong
	}
	sum := sha256.Sum256([]byte(raw))
	if known, ok := i.cache.get(sum); ok && known.holds(time.Now()) {
		return known.claims, nil
	}
	verified, err := i.verify(ctx, raw)
	if err != nil {
		return Claims{}, explain(err)
	}
	i.cache.put(sum, verified)
	return verified.claims, nil
}

func (i *Issuers) verify(ctx context.Context, raw string) (verifiedToken, error) {
	var v verifiedToken
	// A map, because encoding/json would take "SUB" for a struct's sub.
	claims := jwt.MapClaims{}
	_, err := i.parser.ParseWithClaims(raw, claims, func(t *jwt.Token) (key any, err error) {
		// RFC 7515, 4.1.11: an extension that is not understood makes the token invalid.
		if _, ok := t.Header["crit"]; ok {
			return nil, errCritical
		}
		// Not verified yet: it selects the keys, which then prove it.
		iss, _ := claims["iss"].(string)
		if v.issuer = i.trusted[iss]; v.issuer == nil {
			return nil, errIssuer
		}
		key, v.keys, err = i.key(ctx, v.issuer, t.Header)
		return key, err
	})
	if err != nil {
		return v, err
	}
	if err := v.issuer.validator.Validate(claims); err != nil {
		return v, err
	}
	if nbf, _ := claims.GetNotBefore(); nbf != nil {
		v.notBefore = nbf.Time
	}
	v.claims, err = v.issuer.read(claims)
	return v, err
}

// read takes from validated claims what counts here.
func (s *issuer) read(from jwt.MapClaims) (Claims, error) {
	c := Claims{Issuer: s.config.URL}
	var scope string
	for name, to := range map[string]*string{"sub": &c.Subject, "jti": &c.ID, "org_id": &c.Org, "scope": &scope} {
		value, present := from[name]
		if text, ok := value.(string); ok {
			*to = text
		} else if present {
			return Claims{}, refusal(name + " is not a string")
		}
	}
	exp, err := from.GetExpirationTime()
	if err != nil {
		return Claims{}, err
	}
	c.Expires = exp.UTC()
	if _, service := from["org_id"]; !service {
		return c, checkUser(c)
	}
	c.Scopes = strings.Fields(scope)
	return c, s.checkService(c)
}

func checkUser(c Claims) error {
	if !canonicalUUID(c.Subject) {
		return errSubject
	}
	return nil
}

func (s *issuer) checkService(c Claims) error {
	switch {
	case c.Subject == "":
		return errService
	case c.Org == "" || !s.builtIn && !slices.Contains(s.config.Orgs, c.Org):
		return errOrg
	}
	return nil
}

func canonicalUUID(s string) bool {
	id, err := uuid.Parse(s) // also takes upper case, braces and "urn:uuid:"
	return err == nil && id.String() == s
}

// verifiedToken is a token found good, with what must still be so when it comes again.
type verifiedToken struct {
	claims    Claims
	notBefore time.Time // zero when the token has no nbf
	issuer    *issuer
	keys      *keySet // the issuer's when the token was verified
}

// holds tells that the token is good without a doubt: in its time even without leeway, and under
// keys that its issuer has not changed since. Otherwise it must be verified afresh.
func (v verifiedToken) holds(now time.Time) bool {
	return now.Before(v.claims.Expires) && !now.Before(v.notBefore) && v.issuer.keys.Load() == v.keys
}

// tokenCache remembers verified tokens by their SHA-256, because checking a signature costs a few
// hundred times as much. Only tokens that were good get in, so strangers cannot fill it.
type tokenCache struct {
	mu     sync.RWMutex
	tokens map[[sha256.Size]byte]verifiedToken
}

func (c *tokenCache) get(sum [sha256.Size]byte) (verifiedToken, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	v, ok := c.tokens[sum]
	return v, ok
}

func (c *tokenCache) put(sum [sha256.Size]byte, v verifiedToken) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.tokens) >= maxCachedTokens {
		for victim := range c.tokens {
			delete(c.tokens, victim)
			break
		}
	}
	c.tokens[sum] = v
}

// key finds the key that a token's header names, in the key set of s and in no other. A key that is
// not known is asked for, or waited for, once.
func (i *Issuers) key(ctx context.Context, s *issuer, header map[string]any) (crypto.PublicKey, *keySet, error) {
	kid, ok := header["kid"].(string)
	if _, present := header["kid"]; present && !ok {
		return nil, nil, errMalformed
	}
	alg, _ := header["alg"].(string)
	set := s.keys.Load()
	key := set.find(kid, alg)
	if key == nil {
		i.awaitFetch(ctx, s)
		set = s.keys.Load()
		key = set.find(kid, alg)
	}
	if key == nil {
		return nil, nil, errKey
	}
	return key, set, nil
}

// awaitFetch waits until the fetch that runs, or that it may start, has ended. It returns at once
// when there is none, or when enough callers wait already.
func (i *Issuers) awaitFetch(ctx context.Context, s *issuer) {
	done := i.startFetch(s)
	if done == nil {
		return
	}
	select {
	case s.waiters <- struct{}{}:
		defer func() { <-s.waiters }()
	default:
		return
	}
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// startFetch fetches the keys of s in the background, unless that happens already or was begun less
// than fetchGap ago. It returns a channel that closes when the running fetch ends, nil if none runs.
func (i *Issuers) startFetch(s *issuer) <-chan struct{} {
	i.mu.Lock()
	defer i.mu.Unlock()
	allowed := !s.builtIn && time.Since(s.started) >= fetchGap && i.life.Err() == nil
	if s.running == nil && allowed {
		s.started, s.running = time.Now(), make(chan struct{})
		i.work.Go(func() { i.fetch(s) })
	}
	return s.running
}

// keepFresh fetches the keys of s every refreshEvery, and every fetchGap while that fails.
func (i *Issuers) keepFresh(s *issuer) {
	for {
		if done := i.startFetch(s); done != nil {
			<-done
		}
		select {
		case <-i.life.Done():
			return
		case <-time.After(i.untilNext(s)):
		}
	}
}

func (i *Issuers) untilNext(s *issuer) time.Duration {
	i.mu.Lock()
	defer i.mu.Unlock()
	if s.failed {
		return time.Until(s.started.Add(fetchGap))
	}
	return time.Until(s.started.Add(refreshEvery))
}

// fetch renews the keys of s. Whatever goes wrong, those known before stay: an issuer that is down
// must not lock people out.
func (i *Issuers) fetch(s *issuer) {
	ctx, cancel := context.WithTimeout(i.life, fetchTime)
	defer cancel()
	err := i.renew(ctx, s)
	if err != nil && i.life.Err() == nil {
		i.log.Warn("keys of an issuer could not be fetched: those known before stay in use",
			"issuer", s.config.URL, "error", err)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	s.failed = err != nil
	close(s.running)
	s.running = nil
}

func (i *Issuers) renew(ctx context.Context, s *issuer) error {
	raw, err := i.fetchKeys(ctx, s.config)
	if err != nil {
		return err
	}
	if bytes.Equal(raw, s.keys.Load().raw) {
		return nil // the same set stays, so that cached tokens stay good
	}
	set, err := parseKeys(raw)
	if err != nil {
		return err
	}
	s.keys.Store(set)
	i.log.Info("keys of an issuer have changed", "issuer", s.config.URL, "keys", len(set.keys))
	return nil
}

func (i *Issuers) fetchKeys(ctx context.Context, c IssuerConfig) ([]byte, error) {
	if c.JWKS != "" {
		return i.get(ctx, c.JWKS)
	}
	jwks, err := i.discover(ctx, c.URL)
	if err != nil {
		return nil, err
	}
	return i.get(ctx, jwks)
}

// discover asks an issuer where its keys are (OpenID Connect Discovery 1.0, 4).
func (i *Issuers) discover(ctx context.Context, issuer string) (jwks string, err error) {
	raw, err := i.get(ctx, strings.TrimSuffix(issuer, "/")+"/.well-known/openid-configuration")
	if err != nil {
		return "", err
	}
	var metadata struct {
		Issuer string `json:"issuer"`
		JWKS   string `json:"jwks_uri"`
	}
	if err := json.Unmarshal(raw, &metadata); err != nil {
		return "", fmt.Errorf("discovery: %w", err)
	}
	if metadata.Issuer != issuer { // 4.3: exactly
		return "", fmt.Errorf("discovery names the issuer %q: configure exactly that URL if it is the one you trust", metadata.Issuer)
	}
	return metadata.JWKS, checkHop(issuer, metadata.JWKS)
}

func (i *Issuers) get(ctx context.Context, address string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, err
	}
	resp, err := i.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers %s", address, resp.Status)
	}
	raw, err := io.ReadAll(http.MaxBytesReader(nil, resp.Body, maxResponseBytes))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", address, err)
	}
	return raw, nil
}

// keySet is one issuer's keys at one time. It never changes.
type keySet struct {
	raw  []byte // as fetched
	keys []verifyingKey
}

// verifyingKey belongs to one algorithm, whatever a token's header says (RFC 8725, 3.1).
type verifyingKey struct {
	kid, alg string
	key      crypto.PublicKey
}

// find returns the one key for alg that kid names, or nil. A token without kid is served only when
// there is no choice (OpenID Connect Core 1.0, 10.1).
func (s *keySet) find(kid, alg string) crypto.PublicKey {
	var found crypto.PublicKey
	for _, k := range s.keys {
		if k.alg != alg || kid != "" && k.kid != kid {
			continue
		}
		if found != nil {
			return nil
		}
		found = k.key
	}
	return found
}

// parseKeys reads a JWK Set, passing over keys that cannot be used (RFC 7517, 5). An empty set
// withdraws all keys; one of which nothing can be used is an error, like any other garbage.
func parseKeys(raw []byte) (*keySet, error) {
	var doc jwkset.JWKSMarshal
	if err := json.Unmarshal(raw, &doc); err != nil {
		return nil, fmt.Errorf("not a JWK Set: %w", err)
	}
	if doc.Keys == nil {
		return nil, errors.New("not a JWK Set: it has no keys member")
	}
	set := &keySet{raw: raw}
	for _, jwk := range doc.Keys {
		if key, ok := usableKey(jwk); ok {
			set.keys = append(set.keys, key)
		}
	}
	if len(set.keys) == 0 && len(doc.Keys) > 0 {
		return nil, errors.New("none of the keys can be used: there must be an RSA key of 2048 bits or more, a P-256 key or an Ed25519 key, for signatures")
	}
	return set, nil
}

func usableKey(m jwkset.JWKMarshal) (verifyingKey, bool) {
	jwk, err := jwkset.NewJWKFromMarshal(m, jwkset.JWKMarshalOptions{}, jwkset.JWKValidateOptions{})
	if err != nil {
		return verifyingKey{}, false
	}
	alg := algorithm(jwk.Key())
	verifies := m.USE != jwkset.UseEnc && (len(m.KEYOPS) == 0 || slices.Contains(m.KEYOPS, jwkset.KeyOpsVerify))
	agrees := m.ALG == "" || m.ALG == alg
	return verifyingKey{kid: m.KID, alg: alg.String(), key: jwk.Key()}, alg != "" && verifies && agrees
}

// algorithm is the only one that a key may be used for, "" for none.
func algorithm(key any) jwkset.ALG {
	switch k := key.(type) {
	case *rsa.PublicKey:
		if k.N.BitLen() >= minRSABits {
			return jwkset.AlgRS256
		}
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() {
			return jwkset.AlgES256
		}
	case ed25519.PublicKey:
		return jwkset.AlgEdDSA
	}
	return ""
}
