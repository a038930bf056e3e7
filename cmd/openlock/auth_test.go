package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/MicahParks/jwkset"
	"github.com/golang-jwt/jwt/v5"
	"github.com/google/uuid"
	"github.com/openlock/openlock/internal/access"
	"github.com/openlock/openlock/internal/auth"
	"github.com/openlock/openlock/internal/clock"
	"github.com/openlock/openlock/internal/event"
	"github.com/openlock/openlock/internal/store"
)

// aSecret matches API keys, clients' secrets and signed tokens.
var aSecret = regexp.MustCompile(`(?i)ol[ks]_[a-z2-7]{8}|eyJ[\w-]{8,}\.eyJ`)

// discreetRig is a rig that in the end must have kept no secret, neither in its
// log nor anywhere in its data.
func discreetRig(t *testing.T, change ...func(*config)) *rig {
	t.Helper()
	r := newRig(t, change...)
	t.Cleanup(func() {
		if s := aSecret.FindString(r.log.String()); s != "" {
			t.Errorf("the log holds a secret: %s…", s)
		}
		err := filepath.WalkDir(r.path, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			content, err := os.ReadFile(path)
			if s := aSecret.Find(content); s != nil {
				t.Errorf("%s holds a secret: %s…", path, s)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	})
	return r
}

// credential makes a credential of an organization.
func (r *rig) credential(org string, kind store.CredentialKind, scopes ...string) (secret string, c store.Credential) {
	r.t.Helper()
	secret, c, err := r.registry.Create(r.t.Context(), auth.NewCredential{Kind: kind, Org: org, Scopes: scopes})
	if err != nil {
		r.t.Fatal(err)
	}
	return secret, c
}

// service is a service of an organization, with a token for its client.
func (r *rig) service(org string, scopes ...string) (client string, c creds) {
	r.t.Helper()
	secret, made := r.credential(org, store.Client, scopes...)
	a := r.want(r.form(url.Values{"grant_type": {"client_credentials"}, "client_id": {made.ID}, "client_secret": {secret}}), http.StatusOK)
	return made.ID, creds{token: a.get("access_token").(string)}
}

// form asks for a token.
func (r *rig) form(v url.Values, headers ...string) reply {
	r.t.Helper()
	return r.send("POST", "/oauth/token", creds{}, v.Encode(), append([]string{"Content-Type", "application/x-www-form-urlencoded"}, headers...)...)
}

// before is the registry as it was a while ago, to make what has expired since.
func (r *rig) before(ago time.Duration) *auth.Registry {
	return auth.NewRegistry(r.db, clock.Clock{Wall: func() time.Time { return time.Now().Add(-ago).UTC() }})
}

// last is the newest record of the log.
func (r *rig) last() event.Record {
	r.t.Helper()
	records, err := r.db.After(r.t.Context(), r.position()-1, 1)
	if err != nil || len(records) != 1 {
		r.t.Fatalf("the log's end: %v, %v", records, err)
	}
	return records[0]
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestTheKeyDecidesAndTheTokenNamesTheActor(t *testing.T) {
	r := discreetRig(t)
	acme, super := r.org("acme"), r.super()
	owner, user := r.user()
	client, service := r.service("acme", string(access.ManageLocks))
	_, reader := r.service("acme", string(access.ReadLocks))
	r.want(r.send("POST", "/locks/1/CreateLock", acme, map[string]any{"index": 1, "uuid": "u", "ownerId": owner}), http.StatusCreated)
	for i, c := range []struct {
		creds
		actor, org, right string
	}{
		{acme, "org:acme", "acme", "org:acme"},
		{user, "user:" + owner, "", "owner:" + owner},
		{service, "service:" + client, "acme", "org:acme"},
		{creds{acme.key, user.token}, "user:" + owner, "acme", "org:acme"},
		{creds{acme.key, service.token}, "service:" + client, "acme", "org:acme"},
		{super, "operator", "", "super"},
		{creds{super.key, user.token}, "user:" + owner, "", "super"},
	} {
		r.want(r.send("POST", "/locks/1/AddKey", c.creds, map[string]any{"keyUuid": fmt.Sprint(i)}), http.StatusOK)
		m := r.last().Meta
		if m.Actor != c.actor || m.Org != c.org || m.Right != c.right || m.Remote != "127.0.0.1" {
			t.Errorf("%s of %q by right of %q is recorded as %+v", c.actor, c.org, c.right, m)
		}
		if strings.Contains(m.Credential, "key:") != (c.key != "") || strings.Contains(m.Credential, "jwt:"+r.url()+"#") != (c.token != "") {
			t.Errorf("%s: credentials %q", c.actor, m.Credential)
		}
	}
	// A token narrows nothing: without it the key could do the same.
	r.want(r.send("POST", "/locks/1/AddKey", reader, `{"keyUuid":"r"}`), http.StatusForbidden)
	r.want(r.send("POST", "/locks/1/AddKey", creds{acme.key, reader.token}, `{"keyUuid":"r"}`), http.StatusOK)
	r.want(r.exchangeWith("POST", "/locks/1/AddKey", `{"keyUuid":"s"}`, "Authorization", "bEARER   "+user.token), http.StatusOK)
}

// exchangeWith sends header fields as they are given, also twice the same.
func (r *rig) exchangeWith(method, path, body string, headers ...string) reply {
	r.t.Helper()
	req := r.request(method, path, creds{}, strings.NewReader(body))
	for i := 0; i < len(headers); i += 2 {
		req.Header.Add(headers[i], headers[i+1])
	}
	return r.exchange(req)
}

// badKeys are X-API-Key headers that name nobody.
func (r *rig) badKeys(good, token string) map[string]string {
	revoked, c := r.credential("acme", store.APIKey)
	r.must(r.registry.Revoke(r.t.Context(), store.APIKey, "acme", c.ID))
	expired, _, err := r.before(2*time.Hour).Create(r.t.Context(), auth.NewCredential{Kind: store.APIKey, Org: "acme", Expires: time.Hour})
	r.must(err)
	rotated, c := r.credential("acme", store.APIKey)
	_, _, err = r.before(2*time.Hour).Rotate(r.t.Context(), store.APIKey, "acme", c.ID, time.Hour)
	r.must(err)
	secret, _ := r.credential("acme", store.Client)
	return map[string]string{
		"empty": "", "nonsense": "nonsense", "longer": good + "x", "shorter": good[:len(good)-1], "upper case": strings.ToUpper(good),
		"two in one": good + ", " + good, "its id": c.ID, "wildcard": "%", "SQL": "' OR 1=1 --", "a token": token,
		"revoked": revoked, "expired": expired, "rotated": rotated, "a client's secret": secret,
	}
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

// badTokens are Authorization headers that name nobody, with what they hold.
func (r *rig) badTokens(key, user, good string) map[string]string {
	mint := func(b *auth.BuiltIn, user string, at time.Time) (string, auth.Claims) {
		token, claims, err := b.User(user, time.Hour, at)
		r.must(err)
		return "Bearer " + token, claims
	}
	elsewhere := func(url string) string {
		b, err := auth.OpenBuiltIn(filepath.Join(r.t.TempDir(), "key"), url)
		r.must(err)
		token, _ := mint(b, user, time.Now())
		return token
	}
	expired, _ := mint(r.issuer, user, time.Now().Add(-2*time.Hour))
	revoked, claims := mint(r.issuer, user, time.Now())
	r.must(r.registry.RevokeToken(r.t.Context(), claims.ID))
	suspendedUser := uuid.NewString()
	suspended, _ := mint(r.issuer, suspendedUser, time.Now())
	r.must(r.registry.SuspendUser(r.t.Context(), suspendedUser))
	client, service := r.service("acme")
	r.must(r.registry.Revoke(r.t.Context(), store.Client, "acme", client))
	part := strings.Split(good, ".")
	none := enc(`{"alg":"none"}`) + "." + part[1] + "."
	hmac := must(jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims{
		"iss": r.url(), "aud": auth.Audience, "sub": user, "exp": time.Now().Add(time.Hour).Unix(),
	}).SignedString(r.issuer.JWKS()))
	return map[string]string{
		"empty": "", "no token": "Bearer", "blank": "Bearer  ", "no scheme": good, "other scheme": "Token " + good,
		"basic": "Basic " + enc("acme:secret"), "a key": "Bearer " + key, "nonsense": "Bearer x.y.z", "longer": "Bearer " + good + "x",
		"two in one": "Bearer " + good + ", Bearer " + good, "followed": "Bearer " + good + " x", "unsigned": "Bearer " + none,
		"signature cut": "Bearer " + part[0] + "." + part[1] + ".", "other user": "Bearer " + part[0] + "." + enc(`{"sub":"x"}`) + "." + part[2],
		"signed with the public key": "Bearer " + hmac, "far too long": "Bearer " + strings.Repeat("x", 9<<10),
		"other signer": elsewhere(r.url()), "other issuer": elsewhere("https://idp.example"),
		"expired": expired, "revoked": revoked, "suspended": suspended, "revoked client's": "Bearer " + service.token,
	}
}

func enc(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

func TestWhoeverIsNotKnownIsTurnedAway(t *testing.T) {
	r := discreetRig(t)
	acme, _ := r.org("acme"), r.org("beta")
	owner, user := r.user()
	_, ofBeta := r.service("beta")
	r.want(r.send("POST", "/locks/1/CreateLock", acme, map[string]any{"index": 1, "uuid": "u", "ownerId": owner}), http.StatusCreated)
	bearer := "Bearer " + user.token
	cases := map[string][]string{
		"nobody":                       {},
		"two keys":                     {"X-API-Key", acme.key, "X-API-Key", acme.key},
		"two tokens":                   {"Authorization", bearer, "Authorization", bearer},
		"another organization's token": {"X-API-Key", acme.key, "Authorization", "Bearer " + ofBeta.token},
		"super and a service's token":  {"X-API-Key", r.super().key, "Authorization", "Bearer " + ofBeta.token},
		"a cookie":                     {"Cookie", "X-API-Key=" + acme.key},
	}
	for name, key := range r.badKeys(acme.key, user.token) {
		cases["key: "+name] = []string{"X-API-Key", key}
		cases["key beside a token: "+name] = []string{"X-API-Key", key, "Authorization", bearer}
	}
	for name, token := range r.badTokens(acme.key, owner, user.token) {
		cases["token: "+name] = []string{"Authorization", token}
		cases["token beside a key: "+name] = []string{"X-API-Key", acme.key, "Authorization", token}
	}
	for name, headers := range cases {
		r.refused(name+", reading", http.StatusUnauthorized, func() reply { return r.exchangeWith("GET", "/locks/1/details", "", headers...) })
		r.refused(name, http.StatusUnauthorized, func() reply {
			a := r.exchangeWith("POST", openPath(1), `{}`, headers...)
			if a.header.Get("WWW-Authenticate") != `Bearer realm="openlock"` {
				t.Errorf("%s: WWW-Authenticate is %q", name, a.header.Get("WWW-Authenticate"))
			}
			if a.get("error") != "Unauthorized" || !strings.HasPrefix(a.get("message").(string), "Authentication required. Please provide a valid API token") {
				t.Errorf("%s: %s", name, a.raw)
			}
			if s := aSecret.FindString(a.raw); s != "" {
				t.Errorf("%s: the answer repeats a secret: %s", name, a.raw)
			}
			return a
		})
	}
	r.want(r.send("POST", openPath(1), creds{acme.key, user.token}, nil), http.StatusBadGateway) // known: there is just no device
}

func TestCredentialsInTheQueryAreNone(t *testing.T) {
	r := discreetRig(t)
	acme := r.org("acme")
	_, user := r.user()
	secret, client := r.credential("acme", store.Client)
	r.createLock(1, acme)
	for _, name := range []string{"X-API-Key", "x-api-key", "api_key", "apiKey", "key", "access_token", "token", "Authorization"} {
		for _, value := range []string{acme.key, user.token, "Bearer " + user.token} {
			query := "?" + url.Values{name: {value}}.Encode()
			r.refused(name, http.StatusUnauthorized, func() reply { return r.send("POST", openPath(1)+query, creds{}, nil) })
			r.want(r.send("GET", "/locks/1/events"+query, acme, nil), http.StatusOK) // and not logged either
			r.refused(name, http.StatusNotFound, func() reply { return r.send("GET", "/nothing"+query, creds{}, nil) })
		}
	}
	all := url.Values{"grant_type": {"client_credentials"}, "client_id": {client.ID}, "client_secret": {secret}}
	r.want(r.send("POST", "/oauth/token?"+all.Encode(), creds{}, "grant_type=client_credentials", "Content-Type", "application/x-www-form-urlencoded"), http.StatusUnauthorized)
	r.want(r.send("POST", "/oauth/token?"+all.Encode(), creds{}, "", "Content-Type", "application/x-www-form-urlencoded"), http.StatusBadRequest)
	r.want(r.send("POST", openPath(1), creds{}, "access_token="+user.token, "Content-Type", "application/x-www-form-urlencoded"), http.StatusUnauthorized)
}

// status is what a caller gets from a harmless read of a lock.
func (r *rig) status(c creds) int {
	r.t.Helper()
	return r.send("GET", "/locks/1/basic-info", c, nil).status
}

func (r *rig) wantStatus(what string, c creds, want int) {
	r.t.Helper()
	if got := r.status(c); got != want {
		r.t.Errorf("%s: %d, want %d", what, got, want)
	}
}

func TestAKeyIsMadeRotatedAndRevoked(t *testing.T) {
	r := discreetRig(t)
	super := r.super()
	r.createLock(1, r.org("acme"))
	r.org("beta")
	const keys = "/admin/organizations/acme/keys"
	made := r.want(r.send("POST", keys, super, `{"name":"door","scopes":["locks:read"],"expiresInSeconds":3600}`), http.StatusCreated)
	first := creds{key: made.get("secret").(string)}
	r.wantStatus("new", first, http.StatusOK)
	r.want(r.send("POST", openPath(1), first, nil), http.StatusForbidden)
	if made.get("name") != "door" || made.get("orgId") != "acme" || fmt.Sprint(made.get("scopes")) != "[locks:read]" || made.get("expiresAt") == nil {
		t.Errorf("made %s", made.raw)
	}
	path := func(a reply) string { return keys + "/" + a.get("id").(string) }

	turned := r.want(r.send("POST", path(made)+"/rotate", super, `{"overlapSeconds":600}`), http.StatusCreated)
	second := creds{key: turned.get("secret").(string)}
	r.wantStatus("old within the overlap", first, http.StatusOK)
	r.wantStatus("successor", second, http.StatusOK)
	r.want(r.send("POST", openPath(1), second, nil), http.StatusForbidden) // no wider than the old one

	turned2 := r.want(r.send("POST", path(turned)+"/rotate", super, nil), http.StatusCreated)
	third := creds{key: turned2.get("secret").(string)}
	r.wantStatus("old without an overlap", second, http.StatusUnauthorized)
	r.wantStatus("successor of the successor", third, http.StatusOK)
	r.want(r.send("POST", path(turned)+"/rotate", super, nil), http.StatusBadRequest) // it has ended

	r.want(r.send("DELETE", strings.Replace(path(turned2), "acme", "beta", 1), super, nil), http.StatusNotFound)
	r.want(r.send("POST", strings.Replace(path(turned2), "acme", "beta", 1)+"/rotate", super, nil), http.StatusNotFound)
	r.wantStatus("another organization's end", third, http.StatusOK)
	for range 2 { // revoking again changes nothing
		r.want(r.send("DELETE", path(turned2), super, nil), http.StatusOK)
		r.wantStatus("revoked", third, http.StatusUnauthorized)
	}
	r.want(r.send("POST", path(turned2)+"/rotate", super, nil), http.StatusBadRequest)
	r.wantStatus("the oldest, in its overlap still", first, http.StatusOK)

	listed := r.want(r.send("GET", keys, super, nil), http.StatusOK)
	if n := len(listed.get("keys").([]any)); n != 4 || aSecret.MatchString(listed.raw) || strings.Contains(listed.raw, "hash") || strings.Contains(listed.raw, `"secret"`) {
		t.Errorf("%d keys: %s", n, listed.raw)
	}
	revoked := listed.get("keys").([]any)[3].(map[string]any)
	if revoked["id"] != turned2.get("id") || revoked["revokedAt"] == nil {
		t.Errorf("the revoked key is listed as %v", revoked)
	}
}

func TestOrganizationsAreMadeAndListed(t *testing.T) {
	r := discreetRig(t)
	super := r.super()
	a := r.want(r.send("POST", "/admin/organizations", super, `{"id":"acme","name":"Acme Ltd"}`), http.StatusCreated)
	if a.get("id") != "acme" || a.get("name") != "Acme Ltd" || !wireTime.MatchString(a.get("createdAt").(string)) {
		t.Errorf("made %s", a.raw)
	}
	r.want(r.send("POST", "/admin/organizations", super, `{"id":"beta"}`), http.StatusCreated)
	list := r.want(r.send("GET", "/admin/organizations", super, nil), http.StatusOK).get("organizations").([]any)
	if len(list) != 2 || list[0].(map[string]any)["id"] != "acme" || list[1].(map[string]any)["name"] != "beta" {
		t.Errorf("organizations %v", list)
	}
	r.want(r.send("GET", "/admin/organizations/nobody/keys", super, nil), http.StatusNotFound)
	if n := len(r.want(r.send("GET", "/admin/organizations/acme/clients", super, nil), http.StatusOK).get("clients").([]any)); n != 0 {
		t.Errorf("acme has %d clients", n)
	}
}

// wireTime is how times stand on the wire.
var wireTime = regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$`)

func TestOnlySuperKeysAdminister(t *testing.T) {
	r := discreetRig(t)
	acme, super := r.org("acme"), r.super()
	_, user := r.user()
	_, service := r.service("acme")
	_, spare := r.credential("acme", store.APIKey)
	n := 0
	for a, who := range servedRoutes(t) {
		if strings.HasPrefix(a.path, "/admin") != (who == "operator") {
			t.Errorf("%s is for %s", a, who)
		}
		if who != "operator" {
			continue
		}
		n++
		path := a.at("acme", spare.ID)
		for name, c := range map[string]creds{"key": acme, "user": user, "service": service, "both": {acme.key, user.token}} {
			r.refused(a.String()+" by "+name, http.StatusForbidden, func() reply { return r.send(a.method, path, c, `{"id":"x"}`) })
		}
		r.refused(a.String(), http.StatusUnauthorized, func() reply { return r.send(a.method, path, creds{}, `{"id":"x"}`) })
	}
	if n == 0 {
		t.Error("there is no admin API")
	}
	r.want(r.send("GET", "/admin/organizations", creds{super.key, user.token}, nil), http.StatusOK)
}

func TestAUserIsSuspendedAndReactivated(t *testing.T) {
	r := discreetRig(t)
	acme, super := r.org("acme"), r.super()
	id, user := r.user()
	_, other := r.user()
	r.want(r.send("POST", "/locks/1/CreateLock", acme, map[string]any{"index": 1, "uuid": "u", "ownerId": id}), http.StatusCreated)
	for range 2 {
		r.wantStatus("before", user, http.StatusOK)
		for range 2 { // again changes nothing
			r.want(r.send("POST", "/admin/users/"+id+"/suspend", super, nil), http.StatusOK)
		}
		r.wantStatus("suspended", user, http.StatusUnauthorized)
		r.wantStatus("suspended, with a new token", r.tokenOf(id), http.StatusUnauthorized)
		r.wantStatus("suspended, beside a key", creds{acme.key, user.token}, http.StatusUnauthorized)
		r.wantStatus("the key alone", acme, http.StatusOK)
		r.wantStatus("somebody else", other, http.StatusForbidden)
		r.want(r.send("POST", "/admin/users/"+id+"/reactivate", super, nil), http.StatusOK)
	}
}

func TestATokenIsRevokedByItsJTI(t *testing.T) {
	r := discreetRig(t)
	super := r.super()
	id, user := r.user()
	r.want(r.send("POST", "/locks/1/CreateLock", user, `{"index":1,"uuid":"u"}`), http.StatusCreated)
	token, claims, err := r.issuer.User(id, time.Hour, time.Now())
	r.must(err)
	r.wantStatus("before", creds{token: token}, http.StatusOK)
	r.want(r.send("POST", "/admin/tokens/revoke", super, map[string]any{"jti": claims.ID}), http.StatusOK)
	r.wantStatus("revoked", creds{token: token}, http.StatusUnauthorized)
	r.wantStatus("the user's other token", user, http.StatusOK)
}

func TestAServiceGetsATokenForItsSecret(t *testing.T) {
	r := discreetRig(t)
	r.createLock(1, r.org("acme"))
	secret, client := r.credential("acme", store.Client, "locks:read", "locks:open")
	otherSecret, _ := r.credential("acme", store.Client)
	revokedSecret, revoked := r.credential("acme", store.Client)
	r.must(r.registry.Revoke(t.Context(), store.Client, "acme", revoked.ID))
	key, keyRow := r.credential("acme", store.APIKey)
	basic := func(id, secret string) string {
		req := must(http.NewRequest("POST", "/", nil))
		req.SetBasicAuth(url.QueryEscape(id), url.QueryEscape(secret))
		return req.Header.Get("Authorization")
	}
	const ok, bad, unknown = http.StatusOK, http.StatusBadRequest, http.StatusUnauthorized
	own := "client_id=" + client.ID + "&client_secret=" + secret
	for name, c := range map[string]struct {
		header, form string
		status       int
		says         string // error, or scope
	}{
		"Basic":                   {basic(client.ID, secret), "", ok, "locks:read locks:open"},
		"Basic and client_id":     {basic(client.ID, secret), "client_id=" + client.ID, ok, "locks:read locks:open"},
		"form":                    {"", own, ok, "locks:read locks:open"},
		"fewer scopes":            {"", own + "&scope=locks:open", ok, "locks:open"},
		"all scopes, other order": {"", own + "&scope=locks:open+locks:read", ok, "locks:open locks:read"},
		"empty scope":             {"", own + "&scope=", ok, "locks:read locks:open"},

		"wider scope":          {"", own + "&scope=locks:open+locks:manage", bad, "invalid_scope"},
		"unknown scope":        {"", own + "&scope=everything", bad, "invalid_scope"},
		"wrong secret":         {"", own + "x", unknown, "invalid_client"},
		"wrong secret, Basic":  {basic(client.ID, secret+"x"), "", unknown, "invalid_client"},
		"another's secret":     {"", "client_id=" + client.ID + "&client_secret=" + otherSecret, unknown, "invalid_client"},
		"unknown client":       {"", "client_id=nobody&client_secret=" + secret, unknown, "invalid_client"},
		"unknown, Basic":       {basic("nobody", secret), "", unknown, "invalid_client"},
		"no client id":         {"", "client_secret=" + secret, unknown, "invalid_client"},
		"no secret":            {"", "client_id=" + client.ID, unknown, "invalid_client"},
		"nothing":              {"", "", unknown, "invalid_client"},
		"revoked":              {basic(revoked.ID, revokedSecret), "", unknown, "invalid_client"},
		"an API key":           {basic(keyRow.ID, key), "", unknown, "invalid_client"},
		"both ways":            {basic(client.ID, secret), own, bad, "invalid_request"},
		"malformed Basic":      {"Basic !", own, bad, "invalid_request"},
		"another scheme":       {"Bearer x", own, bad, "invalid_request"},
		"Basic not encoded":    {"Basic " + base64.StdEncoding.EncodeToString([]byte("%zz:%zz")), "", bad, "invalid_request"},
		"a parameter twice":    {"", own + "&client_id=" + client.ID, bad, "invalid_request"},
		"not a form":           {"", own + "&x=%zz", bad, "invalid_request"},
		"two grants":           {"", own + "&grant_type=client_credentials", bad, "invalid_request"},
		"semicolons":           {"", own + ";x", bad, "invalid_request"},
		"more than is allowed": {"", own + "&x=" + strings.Repeat("x", 64<<10), bad, "invalid_request"},
	} {
		headers := []string{"Content-Type", "application/x-www-form-urlencoded"}
		if c.header != "" {
			headers = append(headers, "Authorization", c.header)
		}
		a := r.send("POST", "/oauth/token", creds{}, "grant_type=client_credentials&"+c.form, headers...)
		if a.status != c.status || a.header.Get("Cache-Control") != "no-store" { // RFC 6749, 5.1
			t.Errorf("%s: %d %v %s", name, a.status, a.header, a.raw)
		}
		if c.status != ok {
			if a.get("error") != c.says || a.get("error_description") != a.get("message") || c.status == unknown && !strings.HasPrefix(a.header.Get("WWW-Authenticate"), "Basic ") {
				t.Errorf("%s: %v %s", name, a.header, a.raw)
			}
			continue
		}
		if a.get("token_type") != "Bearer" || a.get("expires_in") != 3600.0 || a.get("scope") != c.says {
			t.Errorf("%s: %s", name, a.raw)
		}
		want := http.StatusForbidden // the token can do what its scope says, no more
		if strings.Contains(c.says, "read") {
			want = http.StatusOK
		}
		r.wantStatus(name, creds{token: a.get("access_token").(string)}, want)
	}
	for _, c := range []struct{ contentType, body, says string }{
		{"application/json", `{"grant_type":"client_credentials"}`, "invalid_request"},
		{"", own, "invalid_request"},
		{"application/x-www-form-urlencoded", own, "unsupported_grant_type"},
		{"application/x-www-form-urlencoded", own + "&grant_type=password", "unsupported_grant_type"},
	} {
		a := r.want(r.send("POST", "/oauth/token", creds{}, c.body, "Content-Type", c.contentType), bad)
		if a.get("error") != c.says {
			t.Errorf("%q: %s", c.body, a.raw)
		}
	}
}

func TestATokenDiesWithItsClient(t *testing.T) {
	r := discreetRig(t)
	acme, super := r.org("acme"), r.super()
	r.createLock(1, acme)
	client, service := r.service("acme")
	const clients = "/admin/organizations/acme/clients/"
	r.wantStatus("before", service, http.StatusOK)
	turned := r.want(r.send("POST", clients+client+"/rotate", super, `{"overlapSeconds":600}`), http.StatusCreated)
	r.wantStatus("within the overlap", service, http.StatusOK)
	a := r.want(r.form(url.Values{"grant_type": {"client_credentials"}, "client_id": {turned.get("id").(string)}, "client_secret": {turned.get("secret").(string)}}), http.StatusOK)
	r.want(r.send("DELETE", clients+client, super, nil), http.StatusOK)
	r.wantStatus("revoked", service, http.StatusUnauthorized)
	r.wantStatus("revoked, beside a key", creds{acme.key, service.token}, http.StatusUnauthorized)
	r.wantStatus("the successor's", creds{token: a.get("access_token").(string)}, http.StatusOK)
}

// Any OpenID client can find the issuer's keys and check its tokens.
func TestTheIssuerCanBeDiscovered(t *testing.T) {
	r := discreetRig(t)
	r.org("acme")
	secret, client := r.credential("acme", store.Client)
	var metadata struct {
		Issuer        string
		JWKS          string `json:"jwks_uri"`
		TokenEndpoint string `json:"token_endpoint"`
	}
	a := r.want(r.send("GET", "/.well-known/openid-configuration", creds{}, nil), http.StatusOK)
	r.must(json.Unmarshal([]byte(a.raw), &metadata))
	if metadata.Issuer != r.url() {
		t.Errorf("issuer %q", metadata.Issuer)
	}
	keys, err := jwkset.NewStorageFromHTTP(metadata.JWKS, jwkset.HTTPClientStorageOptions{Client: r.client, Ctx: t.Context()})
	r.must(err)
	resp, err := r.client.PostForm(metadata.TokenEndpoint, url.Values{"grant_type": {"client_credentials"}, "client_id": {client.ID}, "client_secret": {secret}})
	r.must(err)
	defer func() { _ = resp.Body.Close() }()
	var granted struct {
		Token string `json:"access_token"`
	}
	r.must(json.NewDecoder(resp.Body).Decode(&granted))
	_, user := r.user()
	for _, token := range []string{granted.Token, user.token} {
		parsed, err := jwt.Parse(token, func(unverified *jwt.Token) (any, error) {
			key, err := keys.KeyRead(t.Context(), unverified.Header["kid"].(string))
			return key.Key(), err
		}, jwt.WithIssuer(metadata.Issuer), jwt.WithAudience(auth.Audience), jwt.WithExpirationRequired(), jwt.WithValidMethods([]string{"ES256"}))
		if err != nil || !parsed.Valid {
			t.Errorf("a token of ours does not stand: %v", err)
		}
	}
	if raw := string(r.issuer.JWKS()); strings.Contains(raw, `"d"`) {
		t.Error("the key set holds a private key")
	}
}

// idp is somebody else's identity provider.
type idp struct {
	*httptest.Server
	key *ecdsa.PrivateKey
}

// newIDP starts one whose key set is what jwks makes of its key.
func newIDP(t *testing.T, jwks func(w http.ResponseWriter, set []byte)) *idp {
	t.Helper()
	p := &idp{key: must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))}
	jwk := must(jwkset.NewJWKFromKey(&p.key.PublicKey, jwkset.JWKOptions{Metadata: jwkset.JWKMetadataOptions{KID: "k1", ALG: jwkset.AlgES256, USE: jwkset.UseSig}}))
	set := must(json.Marshal(jwkset.JWKSMarshal{Keys: []jwkset.JWKMarshal{jwk.Marshal()}}))
	mux := http.NewServeMux()
	mux.HandleFunc("GET /keys", func(w http.ResponseWriter, _ *http.Request) { jwks(w, set) })
	mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, p.URL, p.URL+"/keys")
	})
	p.Server = httptest.NewServer(mux)
	t.Cleanup(p.Close)
	return p
}

func (p *idp) sign(claims jwt.MapClaims) creds {
	all := jwt.MapClaims{"iss": p.URL, "aud": "doors", "exp": time.Now().Add(time.Hour).Unix()}
	for name, v := range claims {
		if all[name] = v; v == nil {
			delete(all, name)
		}
	}
	token := jwt.NewWithClaims(jwt.SigningMethodES256, all)
	token.Header["kid"] = "k1"
	return creds{token: must(token.SignedString(p.key))}
}

func good(w http.ResponseWriter, set []byte) { _, _ = w.Write(set) }

func TestTokensOfAnotherIssuer(t *testing.T) {
	users, services := newIDP(t, good), newIDP(t, good)
	garbage := newIDP(t, func(w http.ResponseWriter, _ []byte) { _, _ = w.Write([]byte("<html>")) })
	broken := newIDP(t, func(w http.ResponseWriter, _ []byte) { w.WriteHeader(http.StatusInternalServerError) })
	empty := newIDP(t, func(w http.ResponseWriter, _ []byte) { _, _ = w.Write([]byte(`{"keys":[]}`)) })
	dead, stranger := newIDP(t, good), newIDP(t, good)
	dead.Close()
	r := discreetRig(t, func(c *config) {
		for _, p := range []*idp{users, garbage, broken, empty, dead} {
			c.issuers = append(c.issuers, must(auth.ParseIssuer("url="+p.URL+",audience=doors")))
		}
		c.issuers = append(c.issuers, must(auth.ParseIssuer("url="+services.URL+",audience=doors,org=acme,jwks="+services.URL+"/keys")))
	})
	acme := r.org("acme")
	r.org("beta")
	me := uuid.NewString()
	mine := users.sign(jwt.MapClaims{"sub": me, "jti": "j1"})
	r.want(r.send("POST", "/locks/1/CreateLock", mine, `{"index":1,"uuid":"u"}`), http.StatusCreated)
	r.want(r.send("POST", "/locks/1/SetOrganization", mine, `{"orgId":"acme"}`), http.StatusOK)
	r.device(1)
	r.want(r.send("POST", openPath(1), mine, nil, "Prefer", "wait=20"), http.StatusOK)
	r.want(r.send("POST", openPath(1), services.sign(jwt.MapClaims{"sub": "s1", "org_id": "acme", "scope": "locks:open"}), nil, "Prefer", "wait=20"), http.StatusOK)
	r.wantStatus("a service without the scope", services.sign(jwt.MapClaims{"sub": "s1", "org_id": "acme"}), http.StatusForbidden)
	r.wantStatus("its users are others", services.sign(jwt.MapClaims{"sub": uuid.NewString()}), http.StatusForbidden)
	for name, c := range map[string]creds{
		"issuer of users speaks for an organization": users.sign(jwt.MapClaims{"sub": "s1", "org_id": "acme", "scope": "locks:open locks:read"}),
		"issuer speaks for another organization":     services.sign(jwt.MapClaims{"sub": "s1", "org_id": "beta", "scope": "locks:open"}),
		"for no organization":                        services.sign(jwt.MapClaims{"sub": "s1", "org_id": ""}),
		"no UUID":                                    users.sign(jwt.MapClaims{"sub": "admin"}),
		"upper case":                                 users.sign(jwt.MapClaims{"sub": strings.ToUpper(me)}),
		"other audience":                             users.sign(jwt.MapClaims{"sub": me, "aud": "mail"}),
		"expired":                                    users.sign(jwt.MapClaims{"sub": me, "exp": time.Now().Add(-time.Minute).Unix()}),
		"never expires":                              users.sign(jwt.MapClaims{"sub": me, "exp": nil}),
		"not yet":                                    users.sign(jwt.MapClaims{"sub": me, "nbf": time.Now().Add(time.Hour).Unix()}),
		"in another's name":                          stranger.sign(jwt.MapClaims{"sub": me, "iss": users.URL}),
		"in our own name":                            stranger.sign(jwt.MapClaims{"sub": me, "iss": r.url(), "aud": auth.Audience}),
		"stranger":                                   stranger.sign(jwt.MapClaims{"sub": me}),
		"garbage for keys":                           garbage.sign(jwt.MapClaims{"sub": me}),
		"no answer but 500":                          broken.sign(jwt.MapClaims{"sub": me}),
		"no keys":                                    empty.sign(jwt.MapClaims{"sub": me}),
		"dead":                                       dead.sign(jwt.MapClaims{"sub": me}),
	} {
		r.refused(name, http.StatusUnauthorized, func() reply { return r.send("GET", "/locks/1/details", c, nil) })
	}
	r.must(r.registry.RevokeToken(t.Context(), "j1"))
	r.wantStatus("revoked", mine, http.StatusUnauthorized)
	mine = users.sign(jwt.MapClaims{"sub": me})
	r.wantStatus("another", mine, http.StatusOK)

	r.config.issuers = slices.DeleteFunc(r.config.issuers, func(c auth.IssuerConfig) bool { return c.URL == users.URL })
	r.restart()
	r.wantStatus("its issuer was removed", mine, http.StatusUnauthorized)
	r.wantStatus("a key after the restart", acme, http.StatusOK)
}
