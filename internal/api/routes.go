package api

// who may call a route at all. What they may do is decided behind it.
type who int

const (
	anybody  who = iota // without credentials
	known               // with valid credentials
	operator            // with a super key
)

type route struct {
	method, path string
	who          who
	do           func(*Server, *call) error
}

func (r route) pattern() string { return r.method + " " + r.path }

// routes is every route there is.
func (s *Server) routes() []route {
	return []route{
		{"POST", "/locks/{id}/OpenLock", known, (*Server).openLock},
		{"POST", "/locks/{id}/CreateLock", known, (*Server).createLock},
		{"POST", "/locks/{id}/SetOwner", known, (*Server).setOwner},
		{"POST", "/locks/{id}/SetOrganization", known, (*Server).setOrganization},
		{"POST", "/locks/{id}/AddKey", known, (*Server).addKey},
		{"POST", "/locks/{id}/RemoveKey", known, (*Server).removeKey},
		{"GET", "/locks/{id}/basic-info", known, (*Server).basicInfo},
		{"GET", "/locks/{id}/details", known, (*Server).details},
		{"GET", "/locks/{id}/events", known, (*Server).events},
		{"GET", "/locks/{id}/commands", known, (*Server).commands},
		{"GET", "/locks/{id}/commands/{command}", known, (*Server).command},

		{"POST", "/oauth/token", anybody, (*Server).oauthToken},
		{"GET", "/.well-known/openid-configuration", anybody, (*Server).discovery},
		{"GET", "/.well-known/jwks.json", anybody, (*Server).jwks},
		{"GET", "/openapi.json", anybody, (*Server).openapi},
		{"GET", "/health", anybody, (*Server).health},

		{"POST", "/admin/organizations", operator, (*Server).createOrganization},
		{"GET", "/admin/organizations", operator, (*Server).listOrganizations},
		{"POST", "/admin/organizations/{org}/open-expiry", operator, (*Server).setOpenExpiry},
		{"POST", "/admin/organizations/{org}/keys", operator, (*Server).createKey},
		{"GET", "/admin/organizations/{org}/keys", operator, (*Server).listKeys},
		{"POST", "/admin/organizations/{org}/keys/{credential}/rotate", operator, (*Server).rotateKey},
		{"DELETE", "/admin/organizations/{org}/keys/{credential}", operator, (*Server).revokeKey},
		{"POST", "/admin/organizations/{org}/clients", operator, (*Server).createClient},
		{"GET", "/admin/organizations/{org}/clients", operator, (*Server).listClients},
		{"POST", "/admin/organizations/{org}/clients/{credential}/rotate", operator, (*Server).rotateClient},
		{"DELETE", "/admin/organizations/{org}/clients/{credential}", operator, (*Server).revokeClient},
		{"POST", "/admin/users/{user}/suspend", operator, (*Server).suspendUser},
		{"POST", "/admin/users/{user}/reactivate", operator, (*Server).reactivateUser},
		{"POST", "/admin/tokens/revoke", operator, (*Server).revokeToken},
	}
}
